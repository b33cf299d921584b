"""Rounds of different lengths, none included: the same tokens, caches that fit, traces that say what happened."""

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from adaptd.decoding.capture import CaptureConfig
from adaptd.decoding.engine import SpeculativeDecoder
from adaptd.decoding.request import DecodeRequest, Finished, SamplingParams
from buffers.trace import NO_TOKEN, Source
from policies.draft_length import DraftLength
from policies.recall import Recall
from tests.unit.decoding.test_engine_greedy import NEW, VOCAB, case, requests_for
from tests.unit.decoding.test_engine_sampling import PROMPT, assert_distributed, exact_pairs
from tests.unit.decoding.tiny import make_draft, make_model, serve

K, DRAWS = 3, 6144


class Scripted(DraftLength):
    """Plays the given lengths in turns."""

    def __init__(self, k_max: int, lengths: Sequence[int]) -> None:
        super().__init__(k_max)
        self._script = itertools.cycle(lengths)

    def choose(self, classes: Sequence[str], version: int) -> int:
        return next(self._script)


def engine_of(
    target: torch.nn.Module, draft: torch.nn.Module, lengths: Sequence[int] | None, batch: int = 4, **extra: object
) -> SpeculativeDecoder:
    chosen = None if lengths is None else Scripted(K, lengths)
    return SpeculativeDecoder(
        target,
        draft,
        k=K,
        max_batch=batch,
        max_length=80,
        draft_length=chosen,
        **extra,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("lengths", [(0,), (0, 0, 0, 0, 0, 3, 1), (2, 0, 3, 1)], ids=str)
def test_greedy_output_is_transformers_whatever_the_lengths(lengths: tuple[int, ...], batch: int) -> None:
    target, prompts, answers = case("llama")
    done = serve(engine_of(target, make_draft(target), lengths, batch), requests_for(prompts[:12]))
    for at in range(12):
        assert done[str(at)].token_ids == tuple(answers[at][: NEW - at % 7])


@pytest.mark.parametrize("prefill_tokens", [3, 1024])
@pytest.mark.parametrize("extra", [{}, {"sliding_window": 12}], ids=["llama", "window"])
def test_a_draft_that_fell_behind_reads_what_it_missed(extra: dict[str, object], prefill_tokens: int) -> None:
    """The draft is the target itself: where its cache is right everything is accepted, where it is not, something is not."""
    target = make_model("mistral" if extra else "llama", vocab=VOCAB, **extra)
    prompts = case("llama")[1]
    engine = engine_of(target, target, (0, 0, 0, 0, 0, 0, 2, 0, 3, 3, 0, 1), prefill_tokens=prefill_tokens)
    done = serve(engine, requests_for(prompts[:8]))
    judged = sum(sum(finished.stats.reached_at) for finished in done.values())
    assert judged > 30
    assert sum(finished.stats.accepted for finished in done.values()) == judged


def test_counts_are_those_of_what_was_drafted() -> None:
    target, prompts, _ = case("llama")
    lengths = (0, 3, 1)
    params = SamplingParams(temperature=0.0, max_tokens=12)
    finished = serve(engine_of(target, target, lengths, 1), [DecodeRequest("r", prompts[3], params)])["r"]
    stats = finished.stats
    # One token without a draft, four with three proposals, two with one, and so on: 1 + 4 + 2 + 1 + 4.
    assert (stats.rounds, stats.emitted, stats.proposed, stats.accepted) == (5, 12, 7, 7)
    assert (stats.reached_at, stats.accepted_at) == ((3, 2, 2), (3, 2, 2))
    assert stats.share_at_k == pytest.approx(1.0, abs=0.3), "all were accepted, and those cut short are estimated"


def test_a_request_without_any_draft_has_no_share() -> None:
    target, prompts, _ = case("llama")
    finished = serve(engine_of(target, target, (0,), 1), requests_for(prompts[:1]))["0"]
    assert finished.stats.proposed == 0
    assert finished.stats.share_at_k is None
    assert finished.stats.mal == 1.0


@pytest.mark.parametrize("positions", ["all", "rejected"])
def test_traces_hold_the_targets_candidates_of_every_round(positions: str) -> None:
    """What is captured of a position does not depend on the length of its round, but for who proposed there."""
    target, prompts, _ = case("llama")
    draft, capture = make_draft(target, noise=0.05), CaptureConfig(k_top=5, k_draft=4, positions=positions)  # type: ignore[arg-type]

    def traces(lengths: Sequence[int] | None) -> dict[str, Finished]:
        return serve(engine_of(target, draft, lengths, capture=capture), requests_for(prompts[:8]))

    mixed, full = traces((0, 2, 3, 0, 1)), traces(None)
    corrections = 0
    for name, finished in mixed.items():
        trace, other = finished.trace, full[name].trace
        assert trace is not None
        assert other is not None
        assert trace.tokens.tolist() == other.tokens.tolist()
        np.testing.assert_allclose(trace.target_logprob, other.target_logprob, atol=2e-3)
        if positions == "all":
            np.testing.assert_array_equal(trace.topk_ids, other.topk_ids)
            np.testing.assert_allclose(trace.topk_logprobs, other.topk_logprobs, atol=2e-2)
        bonus = trace.source == Source.BONUS
        assert np.isnan(trace.draft_logprob[bonus]).all()
        assert not np.isnan(trace.draft_logprob[~bonus]).any()
        assert (trace.rejected[bonus] == NO_TOKEN).all()
        assert trace.draft_topk_ids.shape == (len(trace.rejected_at), 4)
        corrections += len(trace.rejected_at)
        trace.validate()
    assert corrections > 3


@pytest.mark.parametrize("recalls", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_sampled_tokens_have_the_exact_joint_distribution_at_any_length(
    recalls: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocab = 8
    target, params = make_model(vocab=vocab), SamplingParams(temperature=0.8, top_p=0.9, top_k=6, max_tokens=2)
    recall = Recall(orders=(1, 2), echo=(1,), entries=64, width=3) if recalls else None
    # A generator's seed, not the request's: rounds with a seeded request have a fixed length.
    seeds = itertools.count()
    monkeypatch.setattr("adaptd.decoding.row.secrets.randbits", lambda bits: next(seeds))
    engine = SpeculativeDecoder(
        target,
        make_draft(target, noise=0.06),
        k=2,
        max_batch=1024,
        max_length=16,
        draft_length=Scripted(2, (1, 0, 2, 2, 0)),
        recall=recall,
        capture=CaptureConfig(k_top=3) if recalls else None,
    )
    done = serve(engine, (DecodeRequest(str(number), PROMPT, params) for number in range(DRAWS)))
    assert_distributed(done.values(), exact_pairs(target, params), DRAWS)


def test_a_seed_means_the_same_whatever_lengths_others_are_given() -> None:
    target, prompts, _ = case("llama")
    draft = make_draft(target, noise=0.05)
    seeded = DecodeRequest("seeded", prompts[2], SamplingParams(temperature=1.0, seed=5, max_tokens=14))
    greedy = DecodeRequest("greedy", prompts[4], SamplingParams(temperature=0.0, seed=5, max_tokens=30))
    alone = serve(engine_of(target, draft, None), [seeded])["seeded"]
    chosen = serve(engine_of(target, draft, (0, 1)), [greedy, seeded])
    assert chosen["seeded"].token_ids == alone.token_ids
    assert chosen["seeded"].stats.proposed >= K * (chosen["seeded"].stats.rounds - 1)
    assert chosen["greedy"].stats.proposed < K * (chosen["greedy"].stats.rounds - 1), "a greedy one has no use for it"


def test_two_domains_in_one_batch_are_told_apart() -> None:
    target, prompts, answers = case("llama")
    policy = DraftLength(K)
    engine = SpeculativeDecoder(target, make_draft(target), k=K, max_batch=4, max_length=80, draft_length=policy)
    requests = [
        DecodeRequest(r.request_id, r.prompt_ids, r.params, domain=("math", "tools")[at % 2])
        for at, r in enumerate(requests_for(prompts))
    ]
    done = serve(engine, requests)
    assert [done[str(at)].token_ids for at in range(30)] == [tuple(answers[at][: NEW - at % 7]) for at in range(30)]
    assert set(policy.chosen) == set(engine.draft_lengths) == {"math", "tools"}


def test_a_policy_for_another_length_is_refused() -> None:
    target = case("llama")[0]
    with pytest.raises(ValueError, match=r"draft_length \(k_max 2\) must choose up to k \(3\)"):
        SpeculativeDecoder(target, target, k=3, max_batch=1, max_length=80, draft_length=DraftLength(2))
