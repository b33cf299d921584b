"""What a learner of the benchmark keeps of the traces that it is shown."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from adaptd.bench.learners import Kind, LearnerSpec, build
from adaptd.config import load
from adaptd.learning.cycle import TickReport
from buffers.synthetic import synthetic_trace
from buffers.trace import Source, Trace


def shown(n: int) -> list[Trace]:
    return [synthetic_trace(np.random.default_rng(i), n_response=20, vocabulary=500) for i in range(n)]


def shown_with(source: Source) -> list[Trace]:
    """16 answers whose tokens all came about like that."""
    return [dataclasses.replace(t, source=np.full(t.response_len, source, np.uint8)) for t in shown(16)]


@pytest.mark.parametrize("kind", ["online", "cycle"])
def test_captured_positions_and_top_k_are_those_of_its_settings(kind: Kind) -> None:
    """A cycle that ignored them would be the defaults under another name."""
    sets = {"capture": {"positions": "rejected"}, "learn": {"min_new_traces": 100}, "recall": {"enabled": False}}
    spec = LearnerSpec(name="mine", kind=kind, settings=sets, k_top=4, update_every=100)
    learner = build(spec, load(None), 0)
    traces = shown(6)
    for trace in traces:
        kept = learner.kept(trace)
        kept.validate()
        assert kept.judged_at.tolist() == trace.rejected_at.tolist()
        assert kept.topk_ids.shape == (len(trace.rejected_at), 4)
        assert learner.captured(trace) == kept.nbytes < trace.nbytes
    learner.observe(traces)
    inside = _inside(learner)
    assert len(inside) == len(traces)
    assert all(len(t.topk_ids) == len(t.rejected_at) < t.response_len for t in inside)


def test_what_is_answered_again_is_learned_from_but_never_where_the_gate_judges() -> None:
    sets = {"capture": {"again": 1, "reserved_share": 0.5}, "learn": {"min_new_traces": 1000}}
    learner = build(LearnerSpec(name="mine", kind="cycle", settings=sets), load(None), 0)
    traces = [dataclasses.replace(t, request_id=str(i)) for i, t in enumerate(shown(20))]
    again = {t.request_id: [dataclasses.replace(t, request_id=f"{t.request_id}-again1")] for t in traces}
    learner.observe(traces, again)
    inside = _inside(learner)
    reserved = {t.request_id for t in inside if t.reserved}
    assert 0 < len(reserved) < 20
    asked_once = {t.request_id for t in traces} - reserved
    assert {t.request_id for t in inside} == reserved | asked_once | {f"{name}-again1" for name in asked_once}


def test_a_fall_of_acceptance_makes_a_tick_due_as_in_the_daemon(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 requests of which nothing was accepted, after 64 of which all was: ADWIN cuts long before 1,000 traces."""
    sets = {"learn": {"min_new_traces": 1000}}
    learner = build(LearnerSpec(name="mine", kind="cycle", settings=sets), load(None), 0)
    reasons: list[str] = []
    begun: list[int] = []
    cycle = learner._cycle  # type: ignore[attr-defined]

    def tick(reason: str) -> TickReport:
        reasons.append(reason)
        return TickReport(reason)

    monkeypatch.setattr(cycle, "tick", tick)
    monkeypatch.setattr(cycle, "drifted", lambda: begun.append(len(reasons)))
    good, bad = (shown_with(source) for source in (Source.ACCEPTED, Source.CORRECTION))
    for _ in range(4):
        learner.observe(good)
    assert (reasons, begun) == ([], [])
    for _ in range(2):
        learner.observe(bad)
    assert reasons[:1] == ["drift"]
    assert begun[:1] == [0], "the mixture begins again before the tick"


def test_draws_are_kept_where_they_are_captured_and_not_beside_fewer_candidates() -> None:
    trace = synthetic_trace(np.random.default_rng(0), n_response=20, vocabulary=500, n_tail=8)

    def kept(**spec: Any) -> Trace:
        return build(LearnerSpec(name="mine", kind="online", **spec), load(None), 0).kept(trace)

    assert kept().tail_ids is trace.tail_ids
    assert kept(settings={"capture": {"k_tail": 0}}).tail_ids is None
    assert kept(k_top=4).tail_ids is None
    rejected = kept(settings={"capture": {"positions": "rejected"}})
    rejected.validate()
    assert rejected.tail_ids is not None
    assert trace.tail_ids is not None
    assert rejected.tail_ids.tolist() == trace.tail_ids[trace.rejected_at].tolist()


def test_by_default_everything_is_kept() -> None:
    learner = build(LearnerSpec(name="mine", kind="frozen"), load(None), 0)
    trace = shown(1)[0]
    assert learner.kept(trace) is trace
    assert learner.captured(trace) == trace.nbytes


def _inside(learner: object) -> list[Trace]:
    table = getattr(learner, "_table", None)
    if table is None:
        return list(learner._waiting)  # type: ignore[attr-defined]  # of an online learner
    return [s.trace for stratum in ("recent", "reserved") for s in table.all(stratum, 100)]
