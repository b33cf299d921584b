"""Trace arrays: against a hand-made sequence, and against a teacher-forced pass over the finished text."""

from dataclasses import replace
from functools import cache
from typing import Literal

import numpy as np
import pytest
import torch

from adaptd.decoding.capture import CaptureConfig, Round, RoundPacker, surprise_seed
from adaptd.decoding.engine import SpeculativeDecoder
from adaptd.decoding.request import DecodeRequest, Finished, SamplingParams
from adaptd.decoding.sampling import RowParams, warp
from adaptd.models.compiled import kernels
from buffers.trace import NO_TOKEN, Source, Trace, is_reserved
from policies.surprise import PRIORITY_FLOOR
from tests.unit.decoding.tiny import disturb, make_draft, make_model, make_prompts, serve

CPU = torch.device("cpu")
VOCAB = 61


def logits_of(probs: list[list[float]]) -> torch.Tensor:
    return torch.tensor([probs]).log()


@pytest.mark.skipif(kernels() is None, reason="no C++ compiler")
@pytest.mark.parametrize("positions", ["all", "rejected"])
@pytest.mark.parametrize("k", [0, 1, 4])
@pytest.mark.parametrize("vocab", [61, 4099])
def test_compiled_words_are_those_of_the_framework(vocab: int, k: int, positions: Literal["all", "rejected"]) -> None:
    """Three rows, the second of them greedy; a number of proposals below the most too."""
    generator = torch.Generator().manual_seed(0)

    def logits(count: int) -> torch.Tensor:
        return 4.0 * torch.randn(3, count, vocab, generator=generator)

    def tokens(count: int) -> torch.Tensor:
        return torch.randint(0, vocab, (3, count), generator=generator)

    target = logits(k + 1)
    for draft, p in ((logits(k) if k else None, (0.7 * target).softmax(-1)), (None, None)):
        if draft is None and k:
            continue
        rows = [SamplingParams(temperature=0.0 if p is None else t) for t in (0.7, 0.0, 0.7)]
        accepted = torch.randint(0, k + 1, (3,), generator=generator)
        played = Round(target, draft, p, tokens(k), accepted, tokens(k + 1))
        config = CaptureConfig(k_top=8, k_tail=5, k_draft=3, k_branch=8, positions=positions)
        params = RowParams.build(rows, vocab, CPU)
        packers = [RoundPacker(4, vocab, config, compiled=compiled) for compiled in (True, False)]
        got, right = (packer.pack(played, params, observe=True) for packer in packers)
        assert got.shape == right.shape
        for name, at in packers[0]._at.items():
            mine, theirs = got[:, at], right[:, at]
            if name == "tail_ids":
                # Marks that fall on a border of two tokens may fall on either side of it.
                assert (mine == theirs).mean() > 0.97
            elif "logprob" in name:
                floats = [np.ascontiguousarray(words).view(np.float32) for words in (mine, theirs)]
                np.testing.assert_allclose(*floats, rtol=1e-5, atol=1e-5)
            else:
                np.testing.assert_array_equal(mine, theirs)


def test_a_hand_made_sequence_of_three_tokens_is_judged_by_the_rows_before_its_tokens() -> None:
    """Logits row t-1 judges token t: off by one here is the classic bug of online distillation.

    Prompt [3]; k = 2; the draft proposes 1 then 0; the target (greedy) accepts 1 and says 2 instead of 0.
    """
    target = logits_of([[0.1, 0.6, 0.2, 0.1], [0.05, 0.15, 0.7, 0.1], [0.25, 0.25, 0.25, 0.25]])
    draft = logits_of([[0.2, 0.5, 0.2, 0.1], [0.4, 0.3, 0.2, 0.1]])
    played = Round(
        target_logits=target,
        draft_logits=draft,
        p=None,
        proposals=torch.tensor([[1, 0]]),
        n_accepted=torch.tensor([1]),
        tokens=torch.tensor([[1, 2, 2]]),
    )
    greedy = SamplingParams(temperature=0.0)
    packer = RoundPacker(2, 4, CaptureConfig(k_top=2, k_draft=2, target_id="t"))
    words = packer.pack(played, RowParams.build([greedy], 4, CPU), observe=True)
    assert words.shape == (1, packer.width)
    assert words[0, :4].tolist() == [1, 2, 2, 1], "tokens, then how many were accepted"

    trace = packer.assemble(DecodeRequest("r", [3], greedy, domain="d"), [3, 1, 2], [words[0]], [2], 7, 123.0)
    trace.validate()
    assert trace.tokens.tolist() == [3, 1, 2]
    assert (trace.prompt_len, trace.response_len) == (1, 2)
    assert trace.judging_rows.tolist() == [0, 1]
    assert trace.topk_ids.tolist() == [[1, 2], [2, 1]]
    np.testing.assert_allclose(np.exp(trace.topk_logprobs.astype(float)), [[0.6, 0.2], [0.7, 0.15]], rtol=2e-3)
    assert trace.source.tolist() == [Source.ACCEPTED, Source.CORRECTION]
    assert trace.rejected.tolist() == [NO_TOKEN, 0]
    np.testing.assert_allclose(np.exp(trace.draft_logprob.astype(float)), [0.5, 0.2], rtol=2e-3)
    np.testing.assert_allclose(np.exp(trace.target_logprob.astype(float)), [0.6, 0.7], rtol=2e-3)
    assert trace.rejected_at.tolist() == [1]
    assert trace.draft_topk_ids.tolist() == [[0, 1]]
    np.testing.assert_allclose(np.exp(trace.draft_topk_logprobs.astype(float)), [[0.4, 0.3]], rtol=2e-3)
    assert (trace.draft_version, trace.created_at, trace.domain, trace.engine) == (7, 123.0, "d", "native")
    # Accepted counts 1; the correction's ratio is 0.2 / mean(0.4, 0.3).
    assert trace.surprise == pytest.approx(1 - (1 + 0.2 / 0.35) / 2, rel=1e-3)


MIXED = [
    SamplingParams(temperature=0.0, max_tokens=20),
    SamplingParams(temperature=1.0, max_tokens=17, seed=1),
    SamplingParams(temperature=0.7, top_p=0.9, max_tokens=23, seed=2),
    SamplingParams(temperature=1.2, top_k=9, max_tokens=19, seed=3),
]


@cache
def decoded(positions: str, k: int = 3) -> tuple[torch.nn.Module, torch.nn.Module, list[Finished]]:
    target = make_model(vocab=VOCAB)
    draft = make_draft(target, noise=0.06)
    capture = CaptureConfig(k_top=5, k_draft=4, positions=positions)
    engine = SpeculativeDecoder(target, draft, k=k, max_batch=5, max_length=120, capture=capture)
    requests = [
        DecodeRequest(f"r{at}", prompt, MIXED[at % len(MIXED)]) for at, prompt in enumerate(make_prompts(16, VOCAB))
    ]
    done = serve(engine, requests)
    return target, draft, [done[request.request_id] for request in requests]


def forced(model: torch.nn.Module, trace: Trace) -> torch.Tensor:
    """Logits [R, V] that judge each response token, from one pass over the finished text."""
    with torch.no_grad():
        return model(torch.from_numpy(trace.tokens.astype(np.int64))[None]).logits[0, trace.judging_rows]


def test_traces_agree_with_a_teacher_forced_pass_of_both_models() -> None:
    target, draft, done = decoded("all")
    seen = set()
    for finished in done:
        trace = finished.trace
        assert trace is not None
        trace.validate()
        assert tuple(trace.response.tolist()) == finished.token_ids
        p_logits, q_logits = forced(target, trace), forced(draft, trace)
        logp, logq = p_logits.log_softmax(-1), q_logits.log_softmax(-1)
        best = logp.topk(5)
        assert np.array_equal(trace.topk_ids, best.indices.numpy())
        np.testing.assert_allclose(trace.topk_logprobs.astype(np.float32), best.values.numpy(), atol=0.01, rtol=2e-3)

        emitted = torch.from_numpy(trace.response.astype(np.int64))[:, None]
        at_q = logq.gather(1, emitted)[:, 0].numpy()
        judged = trace.source != Source.BONUS
        assert np.array_equal(np.isnan(trace.draft_logprob), ~judged)
        np.testing.assert_allclose(trace.draft_logprob[judged].astype(np.float32), at_q[judged], atol=0.01, rtol=2e-3)

        params = next(p for p in MIXED if p.temperature == trace.temperature)
        served = warp(p_logits[None], RowParams.build([params], VOCAB, CPU))[0].log()
        at_p = served.gather(1, emitted)[:, 0].numpy()
        np.testing.assert_allclose(trace.target_logprob.astype(np.float32), at_p, atol=0.01, rtol=2e-3)

        corrections = trace.source == Source.CORRECTION
        assert trace.rejected_at.tolist() == np.flatnonzero(corrections).tolist()
        assert np.array_equal(trace.rejected != NO_TOKEN, corrections)
        believed = logq[torch.from_numpy(np.flatnonzero(corrections))].topk(4)
        assert np.array_equal(trace.draft_topk_ids, believed.indices.numpy())
        np.testing.assert_allclose(
            trace.draft_topk_logprobs.astype(np.float32), believed.values.numpy(), atol=0.01, rtol=2e-3
        )
        if params.greedy:
            assert np.array_equal(trace.rejected[corrections], logq.argmax(-1).numpy()[corrections])
            assert (trace.rejected[corrections] != trace.response[corrections]).all()
        stats = finished.stats
        assert (trace.source == Source.ACCEPTED).sum() == stats.accepted
        assert len(trace.source) == stats.emitted
        seen |= set(trace.source.tolist())
    assert seen == {Source.CORRECTION, Source.ACCEPTED, Source.BONUS}


def test_branches_are_what_the_target_says_behind_each_rejected_proposal_and_those_after_it() -> None:
    target, draft, done = decoded("all")
    seen = 0
    for finished in done:
        trace = finished.trace
        assert trace is not None
        assert trace.branches is not None
        assert trace.branches.topk_ids.shape[1] == 5, "32, but no more than at a position of the answer"
        greedy, start = trace.temperature == 0, 0
        for at, n in zip(trace.rejected_at.tolist(), trace.branches.lens.tolist(), strict=True):
            rows = slice(start, start + n)
            start += n
            branch = trace.branches.tokens[rows].tolist()
            assert branch[0] == trace.rejected[at]
            # The round had three proposals: those accepted in front of the correction, and the branch.
            before = trace.source[:at][::-1]
            accepted = next((i for i, s in enumerate(before) if s != Source.ACCEPTED), len(before))
            assert n == 3 - accepted
            text = torch.tensor([trace.tokens[: trace.prompt_len + at].tolist() + branch])
            with torch.no_grad():
                best = target(text).logits[0, -n:].log_softmax(-1).topk(5)
                proposed = draft(text).logits[0, -n - 1 : -1].argmax(-1).tolist()
            assert trace.branches.topk_ids[rows].tolist() == best.indices.tolist()
            np.testing.assert_allclose(
                trace.branches.topk_logprobs[rows].astype(np.float32), best.values.numpy(), atol=0.01, rtol=2e-3
            )
            if greedy:
                assert branch == proposed
        assert start == len(trace.branches.tokens)
        seen += start
    assert seen > 100


@pytest.mark.parametrize("without", [{"k_branch": 0}, {"positions": "rejected"}, {"reserved_share": 1.0}])
def test_nothing_is_kept_behind_rejections_where_nobody_would_learn_from_it(without: dict[str, object]) -> None:
    target = make_model(vocab=VOCAB)
    capture = CaptureConfig(k_top=5, **without)  # type: ignore[arg-type]
    engine = SpeculativeDecoder(
        target, make_draft(target, noise=0.06), k=3, max_batch=1, max_length=120, capture=capture
    )
    trace = serve(engine, [DecodeRequest("r", make_prompts(1, VOCAB)[0], MIXED[0])])["r"].trace
    assert trace is not None
    assert len(trace.rejected_at)
    assert trace.branches is None
    trace.validate()


@pytest.mark.parametrize("positions", ["all", "rejected"])
def test_draws_are_of_the_tokens_that_the_candidates_leave_over(positions: str) -> None:
    target = make_model(vocab=VOCAB)
    capture = CaptureConfig(k_top=5, k_tail=4, k_branch=5, positions=positions, reserved_share=0.4)  # type: ignore[arg-type]
    engine = SpeculativeDecoder(
        target, make_draft(target, noise=0.06), k=3, max_batch=4, max_length=120, capture=capture
    )
    requests = [DecodeRequest(f"r{i}", p, MIXED[i % len(MIXED)]) for i, p in enumerate(make_prompts(24, VOCAB))]
    traces = [f.trace for f in serve(engine, requests).values() if f.trace is not None]
    drawn, counts, expected = 0, np.zeros(VOCAB), np.zeros(VOCAB)
    for trace in traces:
        trace.validate()
        if trace.reserved:
            assert trace.tail_ids is None, "never learned from"
            continue
        assert trace.tail_ids is not None
        assert trace.tail_ids.shape == (len(trace.topk_ids), 4)
        assert not (trace.tail_ids[:, :, None] == trace.topk_ids[:, None]).any()
        p = forced(target, trace).softmax(-1).numpy()[trace.judged_at]
        np.put_along_axis(p, trace.topk_ids.astype(np.int64), 0.0, 1)
        expected += (4 * p / p.sum(1, keepdims=True)).sum(0)
        counts += np.bincount(trace.tail_ids.flatten(), minlength=VOCAB)
        drawn += trace.tail_ids.size
        if positions == "all":
            assert trace.branches is not None
            assert trace.branches.tail_ids is not None
            assert trace.branches.tail_ids.shape == (len(trace.branches.tokens), 4)
            assert not (trace.branches.tail_ids[:, :, None] == trace.branches.topk_ids[:, None]).any()
    assert {t.reserved for t in traces} == {True, False}
    assert drawn > 200
    # Of each token as many as its share of the tails, to three and a half times the error of as many independent draws.
    assert (np.abs(counts - expected) < 3.5 * np.sqrt(expected) + 1).all()


def test_fewer_candidates_behind_rejections_have_no_draws() -> None:
    target = make_model(vocab=VOCAB)
    capture = CaptureConfig(k_top=5, k_tail=4, k_branch=3, reserved_share=0.0)
    engine = SpeculativeDecoder(
        target, make_draft(target, noise=0.06), k=3, max_batch=1, max_length=120, capture=capture
    )
    trace = serve(engine, [DecodeRequest("r", make_prompts(1, VOCAB)[0], MIXED[0])])["r"].trace
    assert trace is not None
    assert trace.tail_ids is not None
    assert trace.branches is not None
    assert trace.branches.tail_ids is None, "what 5 leave over is not what 3 leave over"


def test_draws_move_no_answer() -> None:
    target = make_model(vocab=VOCAB)
    found = []
    for k_tail in (0, 4):
        engine = SpeculativeDecoder(
            target,
            make_draft(target, noise=0.06),
            k=3,
            max_batch=4,
            max_length=120,
            capture=CaptureConfig(k_top=5, k_tail=k_tail),
        )
        requests = [DecodeRequest(f"r{i}", p, MIXED[i % len(MIXED)]) for i, p in enumerate(make_prompts(8, VOCAB))]
        found.append({name: f.token_ids for name, f in serve(engine, requests).items()})
    assert found[0] == found[1]


def test_capturing_rejections_only_keeps_just_those_rows_of_the_full_capture() -> None:
    _, _, full = decoded("all")
    _, _, few = decoded("rejected")
    for all_of_it, rejections in zip(full, few, strict=True):
        a, b = all_of_it.trace, rejections.trace
        assert a is not None
        assert b is not None
        b.validate()
        assert np.array_equal(a.tokens, b.tokens)
        assert np.array_equal(a.rejected_at, b.rejected_at)
        assert np.array_equal(a.topk_ids[a.rejected_at], b.topk_ids)
        np.testing.assert_allclose(a.topk_logprobs[a.rejected_at], b.topk_logprobs, rtol=2e-3)
        assert np.array_equal(a.draft_topk_ids, b.draft_topk_ids)


def test_a_swap_in_the_middle_leaves_the_draft_values_of_the_time_of_serving() -> None:
    """draft_logprob is what the test used, not what today's draft would say."""
    target = make_model(vocab=VOCAB)
    draft = make_draft(target, noise=0.02)
    old = make_draft(target, noise=0.02)
    engine = SpeculativeDecoder(target, draft, k=3, max_batch=1, max_length=120, capture=CaptureConfig(k_top=4))
    swapped_at = []

    def swap(round_: int) -> None:
        if round_ == 4:
            disturb(draft, 0.3, seed=9)
            engine.draft_version = 5
            swapped_at.append(len(engine._rows[0].tokens) - 6)

    request = DecodeRequest("r", [1, 2, 3, 4, 5, 6], SamplingParams(temperature=1.0, seed=4, max_tokens=40))
    finished = serve(engine, [request], swap)["r"]
    trace = finished.trace
    assert trace is not None
    assert (finished.stats.draft_version_min, finished.stats.draft_version_max, trace.draft_version) == (0, 5, 5)
    emitted = torch.from_numpy(trace.response.astype(np.int64))[:, None]
    at_q = forced(old, trace).log_softmax(-1).gather(1, emitted)[:, 0].numpy()
    before = np.arange(len(at_q)) < swapped_at[0]
    known = ~np.isnan(trace.draft_logprob)
    assert np.allclose(trace.draft_logprob[before & known].astype(np.float32), at_q[before & known], atol=0.02)
    assert not np.allclose(trace.draft_logprob[~before & known].astype(np.float32), at_q[~before & known], atol=0.1)


def test_a_request_that_must_not_be_stored_leaves_no_trace_beside_one_that_does() -> None:
    target = make_model(vocab=VOCAB)
    engine = SpeculativeDecoder(target, make_draft(target), k=2, max_batch=2, max_length=60, capture=CaptureConfig())
    kept = DecodeRequest("kept", [1, 2], SamplingParams(temperature=0.0, max_tokens=5))
    done = serve(engine, [kept, replace(kept, request_id="private", store=False)])
    assert done["kept"].trace is not None
    assert done["private"].trace is None
    assert done["kept"].token_ids == done["private"].token_ids


def test_without_capture_there_is_no_trace() -> None:
    target = make_model(vocab=VOCAB)
    engine = SpeculativeDecoder(target, make_draft(target), k=2, max_batch=2, max_length=60)
    done = serve(engine, [DecodeRequest("r", [1], SamplingParams(temperature=0.0, max_tokens=5))])
    assert done["r"].trace is None


def test_traces_are_cut_on_the_left_and_reserved_by_the_hash_of_their_id() -> None:
    target = make_model(vocab=VOCAB)
    capture = CaptureConfig(max_tokens=12, reserved_share=0.5)
    engine = SpeculativeDecoder(target, make_draft(target), k=2, max_batch=8, max_length=60, capture=capture)
    params = SamplingParams(temperature=0.0, max_tokens=8)
    done = serve(engine, [DecodeRequest(f"id-{i}", list(range(1, 20)), params) for i in range(12)])
    for request_id, finished in done.items():
        assert finished.trace is not None
        finished.trace.validate()
        assert len(finished.trace.tokens) == 12
        assert finished.trace.reserved == is_reserved(request_id, 0.5)
    assert len({finished.trace.reserved for finished in done.values() if finished.trace}) == 2


def test_the_surprise_seed_is_high_where_the_target_surprised_the_draft_and_low_where_they_agree() -> None:
    unlikely, favourites = np.array([-9.0]), np.log([[0.5, 0.4]])
    assert surprise_seed(10, np.zeros(0), np.zeros((0, 2))) == PRIORITY_FLOOR
    assert surprise_seed(0, np.zeros(0), np.zeros((0, 2))) == 1.0
    assert surprise_seed(0, unlikely, favourites) == pytest.approx(1.0, abs=1e-3)
    assert surprise_seed(1, unlikely, favourites) == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize(
    "bad", [{"k_top": 0}, {"k_draft": 0}, {"max_tokens": 1}, {"positions": "some"}, {"reserved_share": 2.0}]
)
def test_a_capture_setting_out_of_range_is_refused_by_name(bad: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        CaptureConfig(**bad)
