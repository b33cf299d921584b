"""The learner actor as a plain object: what it does when the target has changed, also without a buffer."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adaptd.actors import learner
from adaptd.config import load
from buffers.errors import TableUnavailable
from buffers.memory_table import MemoryTable
from buffers.synthetic import synthetic_trace
from buffers.table import TableLimits

LIMITS = TableLimits(max_bytes=10**7, ttl_s=None, anchors=16, reserved_max_bytes=10**6)
SMALL = ["adapt.width=8", "adapt.lora_rank=0", "adapt.head_rank=0", "adapt.embed_rank=0", "learn.min_new_traces=4"]


class Flaky(MemoryTable):
    """Unreachable while `down`."""

    down = False

    def age_out(self, target_id: str) -> int:
        if self.down:
            raise TableUnavailable("down")
        return super().age_out(target_id)


@pytest.fixture
def table() -> Flaky:
    found = Flaky("test", LIMITS)
    rng = np.random.default_rng(0)
    found.insert([synthetic_trace(rng, target_id="old") for _ in range(8)], [1.0] * 8)
    return found


@pytest.fixture
def actor(table: Flaky, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(learner, "open_table", lambda *_, **__: table)
    monkeypatch.setattr(learner, "set_threads", lambda *_: None)  # it would lower the priority of all tests
    return learner.LearnerActor(load(None, [f"state_dir={tmp_path}", *SMALL]), "memory")


def size(table: MemoryTable) -> int:
    return sum(table.info().sizes.values())


def test_traces_of_the_old_target_are_gone_before_the_first_tick(actor: Any, table: Flaky) -> None:
    actor.follow_target("old")
    assert size(table) > 0, "the same target over the same folder keeps its traces"
    actor.follow_target("new")
    assert size(table) == 0
    report = actor.tick(False, 0.0)
    assert report is not None
    assert report["steps"] == 0


def test_without_a_buffer_nothing_fails_and_nothing_is_learned_until_they_are_gone(actor: Any, table: Flaky) -> None:
    table.down = True
    actor.follow_target("new")
    assert actor.tick(False, 0.0) is None
    assert size(table) > 0
    table.down = False
    report = actor.tick(False, 0.0)
    assert report is not None
    assert report["steps"] == 0, "aged out first"
    assert size(table) == 0
