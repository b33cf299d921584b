"""What the steps of a tick learn from: how often each trace is used, and what is left out."""

import dataclasses
from collections import Counter

import numpy as np
import pytest

from adaptd.config import LearnConfig
from adaptd.learning import batches
from adaptd.learning.batches import Batches
from buffers.memory_table import MemoryTable
from buffers.synthetic import synthetic_trace
from buffers.table import TableLimits
from buffers.trace import Trace

LIMITS = TableLimits(max_bytes=10**8, ttl_s=None, anchors=64, reserved_max_bytes=10**7)
#: A batch of 8: 2 fresh, 6 replayed, no anchors.
LEARN = LearnConfig(steps_per_tick=50, batch_traces=8, lam=3.0, epsilon=0.0, mix_after=0, priority="uniform")


def made(name: str, n: int, domain: str = "math") -> list[Trace]:
    rng = np.random.default_rng(len(name))
    return [dataclasses.replace(synthetic_trace(rng), request_id=f"{name}-{i}", domain=domain) for i in range(n)]


class Rig:
    """A table, and batches from it."""

    def __init__(self, learn: LearnConfig = LEARN) -> None:
        self.table = MemoryTable("test", LIMITS)
        self.batches = Batches(self.table, learn, np.random.default_rng(0))
        self.uses: Counter[str] = Counter()

    def tick(self, traces: list[Trace], skipped: tuple[str, ...] = (), steps: int = 50) -> None:
        self.table.insert(traces, [1.0] * len(traces))
        assert self.batches.read(skipped)
        for _ in range(steps):
            chosen, weights = self.batches.draw(1.0)
            assert len(chosen) == len(weights) == 8
            self.uses.update(s.trace.request_id for s in chosen)
            self.batches.advance()

    def mean(self, name: str) -> float:
        counts = [n for key, n in self.uses.items() if key.startswith(name)]
        return sum(counts) / len(counts)


def test_new_traces_catch_up_with_those_that_were_learned_from_before() -> None:
    """20 old traces had 20 uses each; 400 more go to 20 new ones until they have had as many."""
    rig = Rig()
    rig.tick(made("old", 20))
    assert rig.mean("old") == 20
    rig.tick(made("new", 20))
    assert rig.mean("new") > 17
    assert rig.mean("old") < 23


def test_without_the_exponent_they_do_not() -> None:
    rig = Rig(LEARN.model_copy(update={"use_exponent": 0.0}))
    rig.tick(made("old", 20))
    rig.tick(made("new", 20))
    # A quarter of the batch is fresh, and half of the rest is.
    assert rig.mean("new") == pytest.approx(20 * (0.25 + 0.75 / 2), abs=1.5)


def test_a_domain_that_needs_no_rehearsal_is_learned_from_while_it_is_fresh_only() -> None:
    rig = Rig(LEARN.model_copy(update={"epsilon": 1.0}))
    rig.tick(made("done", 10, "medical"), steps=1)
    before = rig.uses.total()
    rig.tick(made("now", 10), skipped=("medical",))
    assert sum(n for key, n in rig.uses.items() if key.startswith("done")) == before


def test_an_empty_table_has_nothing() -> None:
    assert not Rig().batches.read(())


def test_a_tick_without_new_traces_replays() -> None:
    rig = Rig()
    rig.tick(made("old", 4))
    rig.tick([])
    assert rig.uses.total() == 2 * 50 * 8
    assert len(rig.batches.fresh) > 0


def test_counts_are_kept_of_the_newest_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "_COUNTED", 4)
    rig = Rig()
    rig.tick(made("old", 20))
    rig.tick(made("new", 2), steps=1)
    assert len(rig.batches._uses) <= 4 + 8
