"""Traces as decoding would have left them, from a teacher-forced pass."""

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from adaptd.bench.branches import BranchScorer, build_scorer
from adaptd.bench.verify import rejections_only, sources, verify
from adaptd.config import Config, checked
from adaptd.decoding.alternatives import Asking
from adaptd.decoding.capture import CaptureConfig
from adaptd.decoding.engine import SpeculativeDecoder
from adaptd.decoding.request import DecodeRequest, SamplingParams
from buffers.codec import decode as decoded
from buffers.codec import encode
from buffers.trace import Source, Trace
from tests.unit.learning.conftest import VOCAB, Decode, K, tiny

A, C, B = Source.ACCEPTED, Source.CORRECTION, Source.BONUS


@pytest.mark.parametrize(
    ("accepted", "found"),
    [
        ([1, 1, 1, 1, 0], [A, A, B, A, C]),
        ([0, 0, 1], [C, C, A]),
        # The position behind a full block is the target's own: whether the draft had it right is not asked.
        ([1, 1, 0, 1, 1, 1], [A, A, B, A, A, B]),
        ([], []),
    ],
)
def test_rounds_of_two_proposals(accepted: list[int], found: list[int]) -> None:
    assert sources(np.array(accepted, dtype=bool), k=2).tolist() == found


def test_greedy_text_gives_the_trace_that_decoding_left(decode: Decode) -> None:
    """Nothing is drawn at temperature 0: sources and rounds must be those of real decoding with that draft."""
    draft = tiny(7)
    done = decode(draft, 12, temperature=0.0)
    answers = [f.trace for f in done if f.trace]
    profiles, traces = verify(draft, answers, 3, np.random.default_rng(0), version=5)
    for finished, profile, trace in zip(done, profiles, traces, strict=True):
        assert finished.trace is not None
        assert trace.source.tolist() == finished.trace.source.tolist()
        assert trace.rejected_at.tolist() == finished.trace.rejected_at.tolist()
        assert profile.rounds == finished.stats.rounds
        assert trace.draft_version == 5
        trace.validate()
        assert decoded(encode(trace)).tokens.tolist() == trace.tokens.tolist()


def test_drawn_acceptances_have_the_expected_rounds(decode: Decode, draft: torch.nn.Module) -> None:
    """200 drawn traces of each of six sampled texts: mean rounds within four standard errors of the expectation."""
    answers = [f.trace for f in decode(tiny(7), 6, temperature=1.0) if f.trace]
    rng = np.random.default_rng(0)
    counts = []
    for _ in range(200):
        profiles, traces = verify(draft, answers, 3, rng, version=1)
        counts.append([_rounds(t.source) for t in traces])
    expected = np.array([p.rounds for p in profiles])
    error = np.array(counts).std(0, ddof=1) / np.sqrt(len(counts))
    assert np.all(error > 0)
    assert np.all(np.abs(np.mean(counts, axis=0) - expected) <= 4 * error)


def _rounds(source: np.ndarray) -> float:
    """Rounds of a drawn trace: those that ended, and the one that the text's end cut."""
    ended = np.isin(source, (Source.CORRECTION, Source.BONUS))
    return float(ended.sum() + (len(source) > 0 and not ended[-1]))


def test_rejections_only_keeps_the_corrections(decode: Decode) -> None:
    answers = [f.trace for f in decode(tiny(7), 4, temperature=1.0) if f.trace]
    _, traces = verify(tiny(7), answers, 3, np.random.default_rng(0), version=0)
    for trace in traces:
        kept = rejections_only(trace)
        kept.validate()
        assert kept.judged_at.tolist() == trace.rejected_at.tolist()
        assert np.array_equal(kept.topk_ids, trace.topk_ids[trace.rejected_at])


def test_the_next_draw_does_not_depend_on_the_draft(decode: Decode) -> None:
    """Common random numbers: two learners that proposed alike are judged alike, whatever came before."""
    answers = [f.trace for f in decode(tiny(7), 4, temperature=1.0) if f.trace]
    left, right = np.random.default_rng(3), np.random.default_rng(3)
    verify(tiny(7), answers, 3, left, version=0)
    verify(tiny(0), answers, 3, right, version=0)
    assert left.random() == right.random()


def test_under_a_greedy_draft_acceptance_is_whether_its_first_choice_was_emitted(decode: Decode) -> None:
    """Also at a temperature, where rejection sampling would accept by chance."""
    draft = tiny(7)
    answers = [f.trace for f in decode(draft, 6, temperature=1.0) if f.trace]
    profiles, traces = verify(draft, answers, 3, np.random.default_rng(0), version=1, rule="greedy_draft")
    for profile, trace in zip(profiles, traces, strict=True):
        with torch.inference_mode():
            rows = draft(input_ids=torch.from_numpy(trace.tokens.astype(np.int64))[None]).logits[0, trace.judging_rows]
        first = rows.argmax(-1).numpy() == trace.response
        assert trace.source.tolist() == sources(first, 3).tolist()
        assert profile.rounds == _rounds(trace.source)


def scorer(target: PreTrainedModel, **more: Any) -> BranchScorer:
    return BranchScorer(target, k=K, k_branch=16, rng=np.random.default_rng(3), **more)


def test_greedy_text_gives_the_branches_that_decoding_left(decode: Decode, target: PreTrainedModel) -> None:
    """Nothing is drawn at temperature 0: tokens and what the target said of them must be those of real decoding."""
    draft = tiny(7)
    left = [f.trace for f in decode(draft, 12, temperature=0.0) if f.trace]
    answers = [trace.without_branches() for trace in left]
    _, traces = verify(draft, answers, K, np.random.default_rng(0), version=5, scorer=scorer(target))
    seen = 0
    for real, trace in zip(left, traces, strict=True):
        trace.validate()
        # A round that the answer's end has cut off left a correction out, with its branch, in either.
        assert trace.rejected_at.tolist() == real.rejected_at.tolist()
        assert trace.rejected.tolist() == real.rejected.tolist()
        assert trace.branches is not None
        assert real.branches is not None
        for name in ("lens", "tokens", "topk_ids"):
            assert getattr(trace.branches, name).tolist() == getattr(real.branches, name).tolist(), name
        scores = (b.topk_logprobs.astype(np.float32) for b in (trace.branches, real.branches))
        np.testing.assert_allclose(*scores, atol=0.02)
        seen += len(trace.branches.tokens)
    assert seen > 200


def test_drawn_branches_are_distributed_as_those_of_decoding(target: PreTrainedModel, draft: PreTrainedModel) -> None:
    """One prompt, many times: what is rejected first and what the draft says behind it, drawn and really decoded."""
    counts: list[Counter[tuple[int, ...]]] = [Counter(), Counter()]
    params = SamplingParams(temperature=1.0, max_tokens=1)
    engine = SpeculativeDecoder(
        target, draft, k=K, max_batch=16, max_length=96, capture=CaptureConfig(k_top=VOCAB, reserved_share=0.0)
    )
    waiting = [DecodeRequest(f"r{i}", [5, 9], replace(params, seed=i)) for i in range(1500)]
    left: list[Trace] = []
    while waiting or engine.active:
        while waiting and engine.can_add():
            engine.add(waiting.pop())
        left += [d.finished.trace for d in engine.step() if d.finished is not None and d.finished.trace is not None]
    answers = [trace.without_branches() for trace in left]
    _, traces = verify(draft, answers, K, np.random.default_rng(0), version=5, scorer=scorer(target))
    for found, count in zip((left, traces), counts, strict=True):
        for trace in found:
            if len(trace.rejected_at):
                assert trace.branches is not None
                assert len(trace.branches.tokens) == K
                count[tuple(trace.branches.tokens[:2].tolist())] += 1
    real, drawn = counts
    total = real.total(), drawn.total()
    assert min(total) > 300
    for pair in set(real) | set(drawn):
        share = (real[pair] + drawn[pair]) / sum(total)
        error = np.sqrt(share * (1 - share) * (1 / total[0] + 1 / total[1]))
        assert abs(real[pair] / total[0] - drawn[pair] / total[1]) < 4.5 * error, pair


def test_alternatives_are_scored_as_an_idle_decoder_scores_them(
    decode: Decode, draft: PreTrainedModel, target: PreTrainedModel
) -> None:
    answers = [f.trace.without_branches() for f in decode(draft, 8, temperature=1.0) if f.trace]
    with_them = scorer(target, alternatives=3)
    _, traces = verify(draft, answers, K, np.random.default_rng(0), version=5, scorer=with_them)
    capture = CaptureConfig(k_top=16, k_branch=16, alternatives=3, reserved_share=0.0)
    engine = SpeculativeDecoder(target, draft, k=K, max_batch=1, max_length=96, capture=capture)
    for trace in traces:
        trace.validate()
        found, corrections = trace.branches, len(trace.rejected_at)
        assert found is not None
        assert len(found.at) > corrections
        assert found.at[:corrections].tolist() == trace.rejected_at.tolist()
        first = int(found.lens[:corrections].sum())
        asking = Asking(trace.without_branches(), found.at[corrections:], found.tokens[first:])
        while not engine.ask(asking):
            pass
        idle = asking.answered().branches
        assert idle is not None
        assert idle.topk_ids[:, 0].tolist() == found.topk_ids[first:, 0].tolist()
        np.testing.assert_allclose(idle.topk_logprobs, found.topk_logprobs[first:], atol=0.02)


def test_draws_behind_branches_are_of_what_the_candidates_leave_over(decode: Decode, target: PreTrainedModel) -> None:
    answers = [f.trace.without_branches() for f in decode(tiny(7), 4, temperature=1.0) if f.trace]
    _, traces = verify(
        tiny(7), answers, K, np.random.default_rng(0), version=5, scorer=scorer(target, k_tail=5, alternatives=2)
    )
    for trace in traces:
        trace.validate()
        assert trace.branches is not None
        assert trace.branches.tail_ids is not None
        assert trace.branches.tail_ids.shape == (len(trace.branches.tokens), 5)
        assert not (trace.branches.tail_ids[:, :, None] == trace.branches.topk_ids[:, None]).any()


def test_only_the_traces_that_are_wanted_get_branches(decode: Decode, target: PreTrainedModel) -> None:
    answers = [f.trace.without_branches() for f in decode(tiny(7), 4, temperature=1.0) if f.trace]
    chosen = scorer(target, wanted=lambda trace: trace.request_id in ("r1", "r2"))
    _, traces = verify(tiny(7), answers, K, np.random.default_rng(0), version=0, scorer=chosen)
    assert {t.request_id for t in traces if t.branches is not None} == {"r1", "r2"}


def test_an_engine_that_drafts_greedily_would_have_proposed_the_drafts_first_choices(
    decode: Decode, target: PreTrainedModel
) -> None:
    draft = tiny(7)
    answers = [f.trace.without_branches() for f in decode(draft, 4, temperature=1.0) if f.trace]
    chosen = scorer(target, rule="greedy_draft")
    _, traces = verify(draft, answers, K, np.random.default_rng(0), version=0, rule="greedy_draft", scorer=chosen)
    for trace in traces:
        assert trace.branches is not None
        start = 0
        for at, n in zip(trace.rejected_at.tolist(), trace.branches.lens.tolist(), strict=True):
            branch = trace.branches.tokens[start : start + n].tolist()
            start += n
            text = torch.tensor([trace.tokens[: trace.prompt_len + at].tolist() + branch])
            with torch.no_grad():
                assert draft(text).logits[0, -n - 1 : -1].argmax(-1).tolist() == branch


@pytest.mark.parametrize("off", [{"capture": {"k_branch": 0}}, {"learn": {"branch_weight": 0.0}}])
def test_nothing_is_scored_where_nobody_would_learn_from_it(
    target: PreTrainedModel, off: dict[str, dict[str, float]]
) -> None:
    def build(config: Config, draft: PreTrainedModel) -> BranchScorer | None:
        return build_scorer(config, target, draft, np.random.default_rng(0), wanted=lambda _: True)

    assert build(Config(), tiny(7)) is not None
    assert build(checked(off), tiny(7)) is None
    windowed = tiny(7)
    windowed.config.sliding_window = 8
    assert build(Config(), windowed) is None
