"""The optimiser: it learns, it leaves everything else alone, it survives bad numbers and restarts."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from adaptd.decoding.request import Finished
from adaptd.learning.evaluate import profiles
from adaptd.learning.learner import DraftLearner
from adaptd.models.scope import AdaptedDraft, ScopeConfig
from buffers.table import ReplaySample, SampleInfo
from policies.acceptance import mal
from policies.objectives import OBJECTIVES
from tests.unit.learning.conftest import tiny

K = 3
Decode = Callable[..., list[Finished]]


def samples_of(done: list[Finished]) -> list[ReplaySample]:
    traces = [f.trace for f in done if f.trace]
    return [
        ReplaySample(SampleInfo(i + 1, 1 / len(traces), 1.0, 1, len(traces), "recent"), t) for i, t in enumerate(traces)
    ]


def adapted(scope: str = "private_expert") -> AdaptedDraft:
    return AdaptedDraft(tiny(7), ScopeConfig(scope=scope, width=32, lora_rank=4))


@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
def test_every_objective_raises_acceptance_on_the_traces_it_learns_from(decode: Decode, objective: str) -> None:
    draft = adapted()
    samples = samples_of(decode(draft.model, 48, temperature=1.0))
    learner = DraftLearner(draft, objective=objective, lr=1e-2, warmup_steps=5)
    before = mal(profiles(draft.model, [s.trace for s in samples], K, max_tokens=256))
    for _ in range(60):
        report = learner.step(samples)
    after = mal(profiles(draft.model, [s.trace for s in samples], K, max_tokens=256))
    assert not report.skipped
    assert after > 1.03 * before, (before, after)


def test_priorities_come_back_for_every_trace(decode: Decode) -> None:
    draft = adapted()
    samples = samples_of(decode(draft.model, 6, temperature=1.0))
    report = DraftLearner(draft, objective="forward_kl", lr=1e-3).step(samples)
    assert set(report.priorities) == {s.info.key for s in samples}
    assert all(0 < p <= 1 for p in report.priorities.values())


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
