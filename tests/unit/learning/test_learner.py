"""The optimiser: it learns, it leaves everything else alone, it survives bad numbers and restarts."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
import torch

from adaptd.bench.verify import rejections_only
from adaptd.config import LearnConfig
from adaptd.decoding.request import Finished
from adaptd.learning.batch import collate, draft_logits
from adaptd.learning.evaluate import profiles
from adaptd.learning.learner import DraftLearner, StepReport
from adaptd.models.scope import AdaptedDraft, ScopeConfig
from buffers.table import ReplaySample, SampleInfo
from buffers.trace import Source, Trace
from policies.acceptance import mal
from policies.divergence import draft_with_tail, kl_tv, with_tail
from policies.objectives import OBJECTIVES
from policies.surprise import PRIORITY_FLOOR
from tests.unit.learning.conftest import VOCAB, tiny

K = 3
Decode = Callable[..., list[Finished]]


def samples_of(done: list[Finished]) -> list[ReplaySample]:
    traces = [f.trace for f in done if f.trace]
    return [
        ReplaySample(SampleInfo(i + 1, 1 / len(traces), 1.0, 1, len(traces), "recent"), t) for i, t in enumerate(traces)
    ]


def answers_of(done: list[Finished]) -> list[ReplaySample]:
    return [s._replace(trace=s.trace.without_branches()) for s in samples_of(done)]


def adapted(scope: str = "private_expert") -> AdaptedDraft:
    return AdaptedDraft(tiny(7), ScopeConfig(scope=scope, width=32, lora_rank=4))


@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
def test_every_objective_raises_acceptance_on_the_traces_it_learns_from(decode: Decode, objective: str) -> None:
    draft = adapted()
    samples = samples_of(decode(draft.model, 48, temperature=1.0))
    learner = DraftLearner(draft, objective=objective, k=K, lr=1e-2, warmup_steps=5)
    before = mal(profiles(draft.model, [s.trace for s in samples], K, max_tokens=256))
    for _ in range(60):
        report = learner.step(samples)
    after = mal(profiles(draft.model, [s.trace for s in samples], K, max_tokens=256))
    assert not report.skipped
    assert after > 1.03 * before, (before, after)


@pytest.mark.parametrize("priority", get_args(LearnConfig.model_fields["priority"].annotation))
@pytest.mark.parametrize("objective", ["forward_kl", "acceptance_length"])
def test_priorities_come_back_for_every_trace(decode: Decode, priority: Any, objective: str) -> None:
    draft = adapted()
    samples = samples_of(decode(draft.model, 6, temperature=1.0))
    report = DraftLearner(draft, objective=objective, k=K, lr=1e-3, priority=priority).step(samples)
    assert set(report.priorities) == {s.info.key for s in samples}
    most = 1 if priority in ("surprise", "agreement", "uniform") else 10
    assert all(0 < p <= most for p in report.priorities.values())
    assert (len(set(report.priorities.values())) == 1) == (priority == "uniform")


def test_a_measured_priority_belongs_to_its_trace_in_whatever_order_they_come(decode: Decode) -> None:
    """A step sorts its traces by length: each must get back the mean of its own positions."""
    samples = samples_of(decode(adapted().model, 6, temperature=1.0))
    samples = [s._replace(trace=s.trace.truncate_left(12 + 3 * (i * 5 % 6))) for i, s in enumerate(samples)]

    def loss_of(chosen: list[ReplaySample]) -> StepReport:
        learner = DraftLearner(adapted(), objective="forward_kl", lr=1e-3, priority="loss", branch_weight=0.0)
        return learner.step(chosen)

    together = loss_of(samples).priorities
    assert len({len(s.trace.tokens) for s in samples}) > 3
    for sample in samples:
        alone = loss_of([sample])
        assert together[sample.info.key] == pytest.approx(alone.priorities[sample.info.key], rel=1e-4)
        assert together[sample.info.key] == pytest.approx(PRIORITY_FLOOR + alone.loss, rel=1e-4)


def test_a_rejection_weight_of_one_changes_nothing_and_another_moves_the_loss_to_the_corrections(
    decode: Decode,
) -> None:
    samples = answers_of(decode(adapted().model, 6, temperature=1.0))

    def loss(only: Source | None = None, **options: Any) -> StepReport:
        chosen = samples if only is None else [s._replace(trace=marked(s.trace, only)) for s in samples]
        return DraftLearner(adapted(), objective="forward_kl", lr=1e-3, **options).step(chosen)

    def marked(trace: Trace, source: Source) -> Trace:
        return dataclasses.replace(trace, source=np.full_like(trace.source, source))

    plain = loss()
    assert loss(rejection_weight=1.0).loss == plain.loss
    at = [s.trace.source == Source.CORRECTION for s in samples]
    share = sum(a.sum() for a in at) / sum(len(a) for a in at)
    assert 0.2 < share < 0.95
    rejected = [s._replace(trace=rejections_only(s.trace)) for s in samples]
    corrections = DraftLearner(adapted(), objective="forward_kl", lr=1e-3).step(rejected)
    others = (plain.loss - share * corrections.loss) / (1 - share)
    expected = (4 * share * corrections.loss + (1 - share) * others) / (4 * share + 1 - share)
    assert abs(expected - plain.loss) > 0.01
    assert loss(rejection_weight=4.0).loss == pytest.approx(expected, rel=1e-4)
    # A weight that all positions share, or none has, is none.
    assert loss(Source.CORRECTION, rejection_weight=4.0).loss == pytest.approx(plain.loss, rel=1e-5)
    assert loss(Source.UNKNOWN, rejection_weight=4.0).loss == plain.loss


def test_the_loss_is_the_mean_over_answers_and_what_stands_behind_rejections(decode: Decode) -> None:
    """Against the answers alone, and every branch read by itself."""
    done = decode(adapted().model, 6, temperature=1.0)
    samples, answers = samples_of(done), answers_of(done)

    def report(chosen: list[ReplaySample], **options: Any) -> StepReport:
        return DraftLearner(adapted(), **({"objective": "kl_tv", "lr": 1e-3} | options)).step(chosen)

    whole, plain = report(samples), report(answers)
    beside = whole.positions - plain.positions
    assert beside == sum(len(s.trace.branches.tokens) for s in samples if s.trace.branches is not None) > 100
    assert whole.tokens == plain.tokens + beside
    divergence = behind(adapted(), samples)
    for weight in (1.0, 0.25):
        expected = (plain.positions * plain.loss + weight * beside * divergence) / (plain.positions + weight * beside)
        assert report(samples, branch_weight=weight).loss == pytest.approx(expected, rel=1e-4)
    assert abs(divergence - plain.loss) > 0.01
    # A trace's importance is that of its branches too.
    assert report(samples[:1]).loss == pytest.approx(
        DraftLearner(adapted(), objective="kl_tv", lr=1e-3).step(samples[:2], np.array([1.0, 0.0])).loss, rel=1e-4
    )
    for off in ({"branch_weight": 0.0}, {"objective": "acceptance_length", "k": K}, {"objective": "cross_entropy"}):
        assert report(samples, **off).loss == report(answers, **off).loss, off  # type: ignore[arg-type]


def behind(draft: AdaptedDraft, samples: list[ReplaySample]) -> float:
    """Mean KL + TV behind each branch token, every branch read by itself."""
    found = []
    for trace in (s.trace for s in samples):
        assert trace.branches is not None
        start = 0
        for at, n in zip(trace.rejected_at.tolist(), trace.branches.lens.tolist(), strict=True):
            rows = slice(start, start + n)
            start += n
            text = np.concatenate([trace.tokens[: trace.prompt_len + at], trace.branches.tokens[rows]])
            with torch.no_grad():
                logits = draft.model(torch.from_numpy(text.astype(np.int64))[None]).logits[0, -n:]
            p = with_tail(torch.from_numpy(trace.branches.topk_logprobs[rows]))
            q = draft_with_tail(logits, torch.from_numpy(trace.branches.topk_ids[rows].astype(np.int64)))
            found += kl_tv(p, q).tolist()
    return float(np.mean(found))


def with_draws(samples: list[ReplaySample], n: int) -> list[ReplaySample]:
    """With draws beside every distribution, of the tokens that a batch's depth leaves over."""
    rng = np.random.default_rng(0)

    def beside(topk_ids: Any) -> Any:
        left = [np.setdiff1d(np.arange(VOCAB), row) for row in topk_ids]
        return np.array([rng.choice(row, n) for row in left], np.uint32).reshape(len(topk_ids), n)

    found = []
    for sample in samples:
        trace, branches = sample.trace, sample.trace.branches
        assert branches is not None
        branches = replace(branches, tail_ids=beside(branches.topk_ids))
        found.append(sample._replace(trace=replace(trace, tail_ids=beside(trace.topk_ids), branches=branches)))
    return found


def replace_draws(sample: ReplaySample, tail_ids: Any) -> ReplaySample:
    return sample._replace(trace=replace(sample.trace, tail_ids=tail_ids))


def test_draws_move_the_weights_and_not_the_loss_that_is_told(decode: Decode) -> None:
    samples = samples_of(decode(adapted().model, 6, temperature=1.0))
    drawn = with_draws(samples, 4)

    def step(chosen: list[ReplaySample], objective: str, **options: Any) -> tuple[float, torch.Tensor]:
        learner = DraftLearner(adapted(), objective=objective, lr=1e-3, **options)
        told = learner.step(chosen).loss
        return told, torch.cat([t.flatten() for t in learner.draft.state().values()])

    for objective in ("forward_kl", "kl_tv", "entropy_adaptive"):
        (told, weights), (plain, others) = step(drawn, objective), step(samples, objective)
        assert told == pytest.approx(plain, rel=1e-6)
        assert not torch.equal(weights, others), objective
    # Where they say nothing about the objective they are not read.
    told, weights = step(drawn, "jsd")
    plain, others = step(samples, "jsd")
    assert told == plain
    assert torch.equal(weights, others)
    # A trace without draws, from a server that gives none, learns beside one that has them.
    assert math.isfinite(step([*drawn[:3], *samples[3:]], "kl_tv")[0])
    # A token that the draft does not have is none: of a target whose vocabulary is padded further.
    beyond = [replace_draws(s, np.full_like(s.trace.tail_ids, VOCAB + 7)) for s in drawn]
    told, weights = step(beyond, "kl_tv", branch_weight=0.0)
    plain, others = step(samples, "kl_tv", branch_weight=0.0)
    assert told == plain
    torch.testing.assert_close(weights, others)


def test_draws_add_the_tails_cross_entropy(decode: Decode) -> None:
    """Against every token of the tail weighed by hand: draws of each token once, where the target's tail is even."""
    sample = samples_of(decode(adapted().model, 1, temperature=1.0))[0]
    trace = replace(sample.trace, branches=None)
    left = np.array([np.setdiff1d(np.arange(VOCAB), row) for row in trace.topk_ids], np.uint32)
    learner = DraftLearner(adapted(), objective="forward_kl", lr=0.0)
    batch = collate([replace(trace, tail_ids=left)], 384)
    logits = draft_logits(learner.draft.model, batch).detach()
    _, _, beyond = learner._compared(logits, batch.topk_logprobs, batch.topk_ids, batch.tail_ids)
    logq = logits.log_softmax(-1)
    rest = torch.ones_like(logq).scatter(1, batch.topk_ids, 0.0)
    mass = (logq.exp() * rest).sum(-1, keepdim=True)
    tail = with_tail(batch.topk_logprobs)[:, -1].exp()
    expected = tail * -((logq - mass.log()) * rest).sum(-1) / rest.sum(-1)
    torch.testing.assert_close(beyond, expected, rtol=1e-4, atol=1e-5)


def test_anchors_that_follow_a_version_follow_nothing_beside_their_answers(decode: Decode) -> None:
    done = decode(adapted().model, 6, temperature=1.0)
    with_them, without = samples_of(done), answers_of(done)

    def loss(samples: list[ReplaySample]) -> float:
        learner = DraftLearner(adapted(), objective="forward_kl", lr=1e-2)
        learner.step(with_them)
        learner.set_reference({})
        return learner.step([s._replace(info=s.info._replace(stratum="anchors")) for s in samples]).loss

    assert loss(with_them) == loss(without) > 0


def test_blocks_are_refused_where_corrections_alone_were_captured(decode: Decode) -> None:
    samples = samples_of(decode(adapted().model, 6, temperature=1.0))
    learner = DraftLearner(adapted(), objective="acceptance_length", k=K, lr=1e-3)
    assert -K < learner.step(samples).loss < 0
    rejected = [s._replace(trace=rejections_only(s.trace)) for s in samples]
    with pytest.raises(ValueError, match="blocks need every position of a sequence; capture all"):
        learner.step(rejected)
    with pytest.raises(ValueError, match="'acceptance_length' needs k"):
        DraftLearner(adapted(), objective="acceptance_length", lr=1e-3)


def test_a_loss_that_is_not_finite_changes_nothing_and_is_counted(decode: Decode) -> None:
    draft = adapted()
    samples = samples_of(decode(draft.model, 4, temperature=1.0))
    learner = DraftLearner(draft, objective="forward_kl", lr=1e-3)
    learner.step(samples)
    name, parameter = next(iter(draft.trainable().items()))
    with torch.no_grad():
        parameter.view(-1)[0] = torch.nan
    before = draft.state()
    for expected in (1, 2, 3):
        report = learner.step(samples)
        assert report.skipped
        assert learner.skipped_in_a_row == expected
    after = draft.state()
    assert all(torch.equal(before[n], after[n]) for n in before if n != name)
    learner.restart({})
    assert not learner.step(samples).skipped
    assert learner.skipped_in_a_row == 0


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_state_restores_weights_moments_and_counters(decode: Decode, optimizer: Any) -> None:
    """After a restart the next step must be the one that would have followed."""
    samples = samples_of(decode(adapted().model, 4, temperature=1.0))
    first = DraftLearner(adapted(), objective="forward_kl", lr=1e-2, warmup_steps=10, optimizer=optimizer)
    for _ in range(3):
        first.step(samples)
    second = DraftLearner(adapted(), objective="forward_kl", lr=1e-2, warmup_steps=10, optimizer=optimizer)
    second.load_state(first.state())
    first.step(samples)
    second.step(samples)
    left, right = first.draft.state(), second.draft.state()
    assert second.steps == first.steps == 4
    assert all(torch.equal(left[n], right[n]) for n in left)


def test_state_of_another_scope_is_refused() -> None:
    learner = DraftLearner(adapted(), objective="forward_kl", lr=1e-2)
    other = DraftLearner(adapted("lora"), objective="forward_kl", lr=1e-2)
    with pytest.raises(ValueError, match="another adaptation scope"):
        learner.load_state(other.state())


def test_anchors_hold_the_draft_at_the_reference(decode: Decode) -> None:
    """At the reference the anchor loss is zero; away from it, anchors alone bring the draft back towards it."""
    draft = adapted()
    samples = samples_of(decode(draft.model, 16, temperature=1.0))
    anchors = [s._replace(info=s.info._replace(stratum="anchors")) for s in samples]
    learner = DraftLearner(draft, objective="forward_kl", lr=1e-2)
    learner.set_reference({})
    assert learner.step(anchors).loss == pytest.approx(0.0, abs=1e-6)
    learner.restart({})
    for _ in range(20):
        learner.step(samples)
    moved = learner.step(anchors).loss
    for _ in range(30):
        back = learner.step(anchors).loss
    assert moved > 0.01
    assert back < 0.5 * moved


def test_the_teacher_of_an_anchor_is_the_version_nearer_to_the_target(decode: Decode) -> None:
    """A better version teaches in the place of day 0; a worse one does not, so its losses are not handed on."""
    draft = adapted()
    samples = samples_of(decode(draft.model, 24, temperature=1.0))
    anchors = [s._replace(info=s.info._replace(stratum="anchors")) for s in samples]
    learner = DraftLearner(draft, objective="forward_kl", lr=1e-2)
    for _ in range(60):
        learner.step(samples)
    better = draft.state()
    # With its gate as it is: a shut one would make it day 0.
    worse = {n: t if n.startswith("request_gate") else t + torch.randn(t.shape) for n, t in better.items()}
    learner.set_reference(better)
    assert learner.step(anchors).loss == pytest.approx(0.0, abs=1e-5)
    learner.restart({})
    assert learner.step(anchors).loss > 0.01, "day 0 is drawn towards the better version"
    learner.restart({})
    learner.set_reference(worse)
    assert learner.step(anchors).loss == pytest.approx(0.0, abs=1e-5), "day 0 stays day 0"


def test_where_traffic_changes_the_average_leaves_what_the_weights_were_behind(decode: Decode) -> None:
    """30 steps after 1,000: a memory of 67 steps stays where it was, one that begins anew is near the weights."""
    far: dict[bool, float] = {}
    for shortened in (False, True):
        draft = adapted()
        samples = samples_of(decode(draft.model, 8, temperature=1.0))
        learner = DraftLearner(draft, objective="forward_kl", lr=1e-2, average_decay=0.985)
        learner.load_state(learner.state() | {"steps": torch.tensor([1000, 1000])})
        if shortened:
            learner.shorten_average()
        for _ in range(30):
            learner.step(samples)
        now, mean = draft.state(), learner.average()
        far[shortened] = float(sum((mean[n] - now[n]).norm() for n in now))
    assert far[True] < 0.6 * far[False]


def test_the_average_trails_the_weights_and_starts_where_they_start(decode: Decode) -> None:
    draft = adapted()
    samples = samples_of(decode(draft.model, 8, temperature=1.0))
    learner = DraftLearner(draft, objective="forward_kl", lr=1e-2, average_decay=0.9)
    start = draft.state()
    assert all(torch.equal(start[n], t) for n, t in learner.average().items())
    for _ in range(5):
        learner.step(samples)
    now, mean = draft.state(), learner.average()
    far = sum((now[n] - start[n]).norm() for n in now)
    assert 0 < sum((mean[n] - start[n]).norm() for n in now) < far
    plain = DraftLearner(adapted(), objective="forward_kl", lr=1e-2, average_decay=0.0)
    plain.step(samples)
    assert all(torch.equal(plain.draft.state()[n], t) for n, t in plain.average().items())
