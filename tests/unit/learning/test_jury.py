"""What a candidate is judged on, and which domains stay with the day-0 draft."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from adaptd.config import GateConfig
from adaptd.decoding.request import Finished
from adaptd.learning.evaluate import profiles
from adaptd.learning.jury import Jury, Ruling
from adaptd.learning.learner import DraftLearner
from adaptd.models.scope import AdaptedDraft, ScopeConfig
from buffers.memory_table import MemoryTable
from buffers.table import TableLimits
from buffers.trace import Trace
from policies.gate import GAIN_STRATUM
from tests.unit.learning.conftest import tiny

GATE = GateConfig(min_traces=4, max_traces=16, resamples=200)
LIMITS = TableLimits(max_bytes=10**8, ttl_s=None, anchors=64, reserved_max_bytes=10**7)


@pytest.fixture(scope="module")
def answers(decode: Callable[..., list[Finished]]) -> list[Trace]:
    return [f.trace for f in decode(tiny(7), 24, temperature=1.0) if f.trace]


def jury(table: MemoryTable, **scope: Any) -> Jury:
    draft = AdaptedDraft(tiny(7), ScopeConfig(width=16, lora_rank=4, **scope))
    learner = DraftLearner(draft, objective="forward_kl", lr=1e-2)
    return Jury(table, learner, GATE, k=3, max_tokens=64, rng=np.random.default_rng(0))


def insert(table: MemoryTable, traces: list[Trace], domain: str, *, reserved: bool = True) -> None:
    named = [dataclasses.replace(t, domain=domain, reserved=reserved) for t in traces]
    table.insert(named, [1.0] * len(named))


def test_the_domains_asked_now_decide_and_every_other_one_guards_with_reserved_traces_alone(answers) -> None:
    table = MemoryTable("test", LIMITS)
    insert(table, answers[:12], "medical")
    insert(table, answers[12:], "code", reserved=False)
    insert(table, answers[12:20], "math")
    found, _ = jury(table)._samples()
    assert {(stratum, s.trace.domain) for stratum, s in found} == {(GAIN_STRATUM, "math"), ("guard", "medical")}
    assert all(s.trace.reserved for _, s in found)
    assert sum(stratum == GAIN_STRATUM for stratum, _ in found) == 8
    assert sum(stratum == "guard" for stratum, _ in found) == GATE.max_traces // 2


def test_a_draft_that_cannot_gate_requests_keeps_no_domain_on_the_base(answers) -> None:
    table = MemoryTable("test", LIMITS)
    insert(table, answers[:12], "medical")
    one = jury(table, request_gate=False)
    ruinous = {n: t + 0.5 * torch.randn(t.shape) for n, t in one._learner.draft.state().items()}
    ruling = one.judge(ruinous)
    assert ruling.on_base == frozenset()
    assert ruling.verdict.by_domain["medical"].mean < 0


def test_what_is_kept_on_the_base_is_judged_and_served_as_the_base(answers) -> None:
    """A candidate that is ruinous on medical and promoted for math serves medical exactly as day 0 does."""
    table = MemoryTable("test", LIMITS)
    insert(table, answers[:12], "medical")
    insert(table, answers[12:], "math")
    one = jury(table)
    draft = one._learner.draft
    ruinous = {
        n: t if n.startswith("request_gate") else t + 0.5 * torch.randn(t.shape) for n, t in draft.state().items()
    }
    ruling: Ruling = one.judge(ruinous)
    assert "medical" in ruling.on_base
    assert ruling.verdict.by_domain["medical"].mean == 0.0
    assert "medical" in ruling.report["on_base"]
    one.accept(ruinous, ruling)
    assert one.on_base == ruling.on_base

    day_0 = one._scored([("guard", s) for s in table.all("reserved")[:4]], {})
    draft.load(ruinous)
    draft.keep_on_base(ruling.on_base)
    served = profiles(draft.model, [s.trace for s in table.all("reserved")[:4]], 3, max_tokens=64)
    assert [p.rounds for p in served] == pytest.approx([s.rounds for s in day_0])


def test_scores_of_the_version_that_serves_are_taken_once(answers, monkeypatch) -> None:
    table = MemoryTable("test", LIMITS)
    insert(table, answers[:8], "math")
    one = jury(table)
    scored: list[int] = []
    plain = one._scored
    monkeypatch.setattr(one, "_scored", lambda samples, tensors: scored.append(len(samples)) or plain(samples, tensors))
    one.judge(one._learner.average())
    one.judge(one._learner.average())
    assert scored == [8, 8, 8], "candidate and day 0, then the candidate alone"


def test_the_ruling_says_whose_traffic_is_gone(answers) -> None:
    table = MemoryTable("test", LIMITS)
    insert(table, answers[:12], "medical")
    insert(table, answers[12:14], "math")
    one = jury(table, request_gate=False)
    assert one.judge(one._learner.average()).gone == frozenset(), "two in a row may be chance"
    insert(table, answers[14:], "math")
    ruling = one.judge(one._learner.average())
    assert ruling.gone == {"medical"}
    assert ruling.report["gone"] == ["medical"]
