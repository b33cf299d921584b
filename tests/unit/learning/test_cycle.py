"""One tick against a real store and the in-memory table: what is read, what is published, what happens on trouble."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adaptd.config import GateConfig, LearnConfig
from adaptd.decoding.request import Finished
from adaptd.learning.cycle import Identity, LearnerCycle
from adaptd.learning.learner import DraftLearner, StepReport
from adaptd.learning.quarantine import take_back
from adaptd.models.scope import AdaptedDraft, ScopeConfig
from buffers.memory_table import MemoryTable
from buffers.table import TableLimits
from buffers.trace import Trace
from checkpoints.store import CheckpointStore
from policies.gate import Verdict, judge
from tests.unit.learning.conftest import tiny

K = 3
LIMITS = TableLimits(max_bytes=10**8, ttl_s=None, anchors=64, reserved_max_bytes=10**7)
LEARN = LearnConfig(steps_per_tick=10, batch_traces=16, lr=1e-2, warmup_steps=2, mix_after=2, max_refusals=2)
GATE = GateConfig(min_traces=4, resamples=200)


class Rig:
    """A cycle with everything it owns."""

    def __init__(self, home: Path, gate: GateConfig = GATE, learn: LearnConfig = LEARN) -> None:
        self.home = home
        self.pauses: list[float] = []
        self.table = MemoryTable("test", LIMITS)
        self.store = CheckpointStore(home / "checkpoints")
        self.draft = AdaptedDraft(tiny(7), ScopeConfig(width=32, lora_rank=4))
        self.learner = DraftLearner(self.draft, **learn.model_dump(include=set(DraftLearner.OPTIONS)))
        identity = Identity(self.draft.base_id, "tok", self.draft.scope, self.draft.scope_config, {})
        self.cycle = LearnerCycle(
            self.table,
            self.store,
            self.learner,
            identity,
            learn=learn,
            gate=gate,
            k=K,
            state_file=home / "learner" / "state.safetensors",
            rng=np.random.default_rng(0),
            pause=self.pauses.append,
        )

    def fill(self, traces: list[Trace]) -> None:
        self.table.insert(traces, [t.surprise for t in traces])


Decode = Callable[..., list[Finished]]


@pytest.fixture(scope="module")
def traces(decode: Decode) -> list[Trace]:
    """Every fourth is reserved."""
    found = [f.trace for f in decode(tiny(7), 80, temperature=1.0) if f.trace]
    return [dataclasses.replace(t, reserved=i % 4 == 0, domain="math") for i, t in enumerate(found)]


def test_ticks_publish_a_better_draft_and_say_why(tmp_path: Path, traces: list[Trace]) -> None:
    rig = Rig(tmp_path)
    rig.fill(traces)
    reports = [rig.cycle.tick("traces") for _ in range(8)]
    published = [r.published for r in reports if r.published]
    assert published
    manifest, tensors = rig.store.load(published[-1])
    assert rig.store.current() == published[-1]
    assert manifest.gate["promote"]
    assert manifest.gate["gain"]["low"] > 0
    assert manifest.window["learner_steps"] > 0
    assert set(tensors) == set(rig.draft.state())
    assert rig.cycle.totals["promoted"] == len(published)


def test_reserved_traces_are_never_trained_on(
    tmp_path: Path, traces: list[Trace], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gate that judges on what was learned promotes everything."""
    rig = Rig(tmp_path)
    rig.fill(traces)
    seen: set[str] = set()
    step = rig.learner.step

    def spy(samples: Any, weights: Any = None) -> StepReport:
        seen.update(s.trace.request_id for s in samples)
        return step(samples, weights)

    monkeypatch.setattr(rig.learner, "step", spy)
    for _ in range(3):
        rig.cycle.tick("traces")
    assert seen
    assert not seen & {t.request_id for t in traces if t.reserved}


def test_a_candidate_that_is_no_better_is_refused_and_learning_restarts_after_some(
    tmp_path: Path, traces: list[Trace]
) -> None:
    rig = Rig(tmp_path, gate=GATE.model_copy(update={"min_gain": 9.0}))
    rig.fill(traces)
    for _ in range(LEARN.max_refusals):
        report = rig.cycle.tick("traces")
        assert report.verdict is not None
        assert not report.verdict["promote"]
    assert rig.store.current() is None
    assert rig.cycle.totals["restarts"] == 1
    fresh = AdaptedDraft(tiny(7), ScopeConfig(width=32, lora_rank=4)).state()
    assert all(torch.equal(t, fresh[n]) for n, t in rig.draft.state().items()), "restart means the published version"


def test_three_losses_that_are_not_finite_restart_from_the_published_version(
    tmp_path: Path, traces: list[Trace]
) -> None:
    rig = Rig(tmp_path)
    rig.fill(traces)
    with torch.no_grad():
        next(iter(rig.draft.trainable().values())).fill_(torch.nan)
    report = rig.cycle.tick("traces")
    assert report.skipped_steps == 3
    assert rig.cycle.totals["restarts"] == 1
    assert report.steps == LEARN.steps_per_tick - 3, "after the restart the tick goes on"


def test_an_empty_table_is_no_tick(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    report = rig.cycle.tick("time")
    assert (report.steps, report.verdict) == (0, None)
    assert rig.store.current() is None


def test_a_restart_of_the_process_goes_on_where_it_was(tmp_path: Path, traces: list[Trace]) -> None:
    first = Rig(tmp_path)
    first.fill(traces)
    first.cycle.tick("traces")
    second = Rig(tmp_path)
    assert second.learner.steps == first.learner.steps
    left, right = first.draft.state(), second.draft.state()
    assert all(torch.equal(left[n], right[n]) for n in left)


def test_rollback_publishes_the_parent_and_the_learner_follows(tmp_path: Path, traces: list[Trace]) -> None:
    rig = Rig(tmp_path)
    rig.fill(traces)
    while (rig.store.current() or 0) < 2:
        rig.cycle.tick("traces")
    _, parent = rig.store.load(rig.store.manifest(rig.store.current() or 0).parent or 0)
    manifest = rig.cycle.rollback("test")
    assert rig.store.current() == manifest.version
    assert all(torch.equal(parent[n], t) for n, t in rig.draft.state().items())


def test_the_saved_state_of_a_version_that_went_back_is_not_taken_up_again(tmp_path: Path, traces: list[Trace]) -> None:
    """Rolled back without the learner (no daemon ran, or it was killed): weights and moments rest on refused tensors."""
    rig = Rig(tmp_path)
    rig.fill(traces)
    while (rig.store.current() or 0) < 2:
        rig.cycle.tick("traces")
    parent = rig.store.manifest(rig.store.current() or 0).parent or 0
    take_back(rig.store, parent, [rig.store.current() or 0], "test")
    again = Rig(tmp_path)
    _, tensors = rig.store.load(parent)
    assert again.learner.steps == 0
    assert all(torch.equal(tensors[n], t) for n, t in again.draft.state().items())
    assert all(torch.equal(tensors[n], t) for n, t in again.learner.average().items())


def test_a_tick_publishes_nothing_over_a_version_that_it_did_not_learn_from(
    tmp_path: Path, traces: list[Trace], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The watch goes back while a tick runs: its candidate is a child of what was refused."""
    rig = Rig(tmp_path)
    rig.fill(traces)
    while not rig.store.current():
        rig.cycle.tick("traces")
    ruling = rig.cycle._jury.judge

    def meanwhile(candidate: Any) -> Any:
        if rig.store.current() == 1:
            take_back(rig.store, 0, [1], "test")
        found = ruling(candidate)
        return dataclasses.replace(found, verdict=dataclasses.replace(found.verdict, promote=True))

    monkeypatch.setattr(rig.cycle._jury, "judge", meanwhile)
    report = rig.cycle.tick("traces")
    assert report.published is None
    assert report.verdict is not None
    assert "version 2 serves, not 1" in report.verdict["reason"]
    assert rig.store.current() == 2
    fresh = AdaptedDraft(tiny(7), ScopeConfig(width=32, lora_rank=4)).state()
    assert all(torch.equal(t, fresh[n]) for n, t in rig.draft.state().items()), "it follows to day 0"
    assert rig.cycle.tick("traces").published == 3, "and learns on from there"


def test_following_is_nothing_where_the_learner_stands_there_already(tmp_path: Path, traces: list[Trace]) -> None:
    rig = Rig(tmp_path)
    rig.fill(traces)
    rig.cycle.tick("traces")
    steps = rig.learner.steps
    assert not rig.cycle.follow("test")
    assert rig.learner.steps == steps
    assert rig.cycle.totals["restarts"] == 0


def test_a_new_target_ages_out_what_the_old_one_judged_and_learning_begins_with_fresh_traces(
    tmp_path: Path, traces: list[Trace]
) -> None:
    rig = Rig(tmp_path)
    rig.fill([dataclasses.replace(t, target_id="old") for t in traces])
    rig.cycle.tick("traces")
    assert rig.cycle._batches.steps > 0
    assert rig.cycle.follow_target("old") == 0
    assert rig.cycle._batches.steps > 0, "a restart over the same target changes nothing"
    assert rig.cycle.follow_target("new") == len(traces)
    assert rig.cycle._batches.steps == 0
    assert sum(rig.table.info().sizes.values()) == 0
    assert rig.cycle.tick("time").steps == 0, "nothing of the old target is left to learn from"
    rig.fill([dataclasses.replace(t, target_id="new") for t in traces])
    report = rig.cycle.tick("traces")
    assert report.steps > 0
    assert report.verdict is not None, "the version that is served is judged on the new target's traces"


def test_a_chain_of_small_losses_is_stopped_at_day_0(
    tmp_path: Path, traces: list[Trace], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Day 0 is the floor once a version is published: the gate gets its scores of the same traces."""
    rig = Rig(tmp_path)
    rig.fill(traces)
    floors: list[Any] = []

    def spy(candidate: Any, incumbent: Any, *, floor: Any, **limits: Any) -> Verdict:
        floors.append(floor)
        return judge(candidate, incumbent, floor=floor, **limits)

    monkeypatch.setattr("adaptd.learning.jury.judge", spy)
    while rig.store.current() is None:
        day0 = rig.cycle._jury._scored(rig.cycle._jury._samples()[0], {})
        rig.cycle.tick("traces")
    assert floors[-1] == day0, "also while day 0 is the incumbent: a sure gain may buy a loss, but not below it"
    rig.cycle.tick("traces")
    assert floors[-1] == day0


def test_a_candidate_that_is_not_finite_never_reaches_the_gate(
    tmp_path: Path, traces: list[Trace], monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(tmp_path)
    rig.fill(traces)
    broken = {name: torch.full_like(tensor, torch.nan) for name, tensor in rig.learner.average().items()}
    monkeypatch.setattr(rig.learner, "average", lambda: broken)
    report = rig.cycle.tick("traces")
    assert report.verdict is None
    assert rig.cycle.totals["restarts"] == 1
    assert rig.store.current() is None


def test_a_learner_with_a_duty_cycle_rests_in_proportion_to_its_work(tmp_path, traces, monkeypatch) -> None:
    rig = Rig(tmp_path, learn=LEARN.model_copy(update={"duty_cycle": 0.25}))
    worked: list[float] = []
    step = rig.learner.step

    def timed(*given: Any) -> StepReport:
        report = step(*given)
        worked.append(report.seconds)
        return report

    monkeypatch.setattr(rig.learner, "step", timed)
    rig.fill(traces)
    rig.cycle.tick("traces")
    assert rig.pauses[:-1] == pytest.approx([3 * seconds for seconds in worked])
    assert rig.pauses[-1] > 0, "and after the gate's look"
    assert len(worked) == LEARN.steps_per_tick


def test_by_default_a_learner_does_not_rest(tmp_path, traces) -> None:
    rig = Rig(tmp_path)
    rig.fill(traces)
    rig.cycle.tick("traces")
    assert rig.pauses == []
