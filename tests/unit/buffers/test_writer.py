"""The writer: appending never waits, nothing is lost uncounted, and it finds its way back to a restarted Redis."""

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from buffers.embedded import start_embedded
from buffers.errors import TableUnavailable
from buffers.memory_table import MemoryTable
from buffers.redis_table import RedisTable
from buffers.synthetic import synthetic_trace
from buffers.table import Key, TableLimits
from buffers.trace import Trace
from buffers.writer import Backoff, TraceWriter

LIMITS = TableLimits(max_bytes=10_000_000, ttl_s=None, anchors=10, reserved_max_bytes=1_000_000)
TRACE = synthetic_trace(np.random.default_rng(0), n_prompt=2, n_response=3, n_top=2)
QUICK = Backoff(first_s=0.01, longest_s=0.05)


class FakeTable(MemoryTable):
    """A memory table that can be away, hold its callers, or be faulty."""

    def __init__(self) -> None:
        super().__init__("fake", LIMITS)
        self.away = False
        self.fault: Exception | None = None
        self.open = threading.Event()
        self.open.set()
        self.batches: list[int] = []

    def insert(self, traces: Sequence[Trace], priorities: Sequence[float]) -> list[Key]:
        self.open.wait(10)
        if self.away:
            raise TableUnavailable("away")
        if self.fault:
            raise self.fault
        keys = super().insert(traces, priorities)
        self.batches.append(len(traces))
        return keys


def wait_for(condition: Callable[[], bool], timeout: float = 10.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "condition not met in time"
        time.sleep(0.005)


def numbered(number: int) -> Trace:
    return replace(TRACE, draft_version=number)


def stored(table: FakeTable) -> list[int]:
    return [sample.trace.draft_version for sample in table.all("recent")]


def test_traces_arrive_in_order_and_in_batches() -> None:
    table = FakeTable()
    writer = TraceWriter(table, batch=10, flush_interval_s=30)
    assert all(writer.append(numbered(i), 1.0) for i in range(25))
    wait_for(lambda: sum(table.batches) == 20)  # full batches go at once
    assert writer.flush(5)  # flush hurries the rest
    assert stored(table) == list(range(25))
    assert max(table.batches) == 10
    stats = writer.stats()
    assert (stats.appended, stats.written, stats.dropped, stats.pending, stats.available) == (25, 25, 0, 0, True)
    assert writer.close(5)


def test_a_lone_trace_leaves_after_the_flush_interval() -> None:
    table = FakeTable()
    writer = TraceWriter(table, batch=1000, flush_interval_s=0.02)
    writer.append(TRACE, 1.0)
    wait_for(lambda: stored(table) == [0])
    assert writer.close(5)


def test_append_returns_at_once_while_the_table_hangs_and_the_oldest_waiting_are_dropped() -> None:
    table = FakeTable()
    table.open.clear()
    writer = TraceWriter(table, max_pending=50, batch=10, flush_interval_s=0.01)
    for i in range(10):
        writer.append(numbered(i), 1.0)
    wait_for(lambda: len(writer._queue) == 0)  # the thread holds 0..9 and hangs
    started = time.perf_counter()
    results = [writer.append(numbered(i), 1.0) for i in range(10, 2010)]
    elapsed = time.perf_counter() - started
    assert elapsed < 1.0, f"2,000 appends took {elapsed:.2f} s beside a table that hangs"
    assert results == [True] * 40 + [False] * 1960
    assert writer.stats().pending == 50
    table.open.set()
    assert writer.flush(10)
    assert stored(table) == [*range(10), *range(1970, 2010)]
    stats = writer.stats()
    assert (stats.appended, stats.written, stats.dropped) == (2010, 50, 1960)
    writer.close(5)


def test_an_absent_table_costs_nothing_but_time_while_the_queue_holds() -> None:
    table = FakeTable()
    table.away = True
    writer = TraceWriter(table, batch=4, flush_interval_s=0.01, backoff=QUICK)
    for i in range(12):
        assert writer.append(numbered(i), 1.0)
    wait_for(lambda: writer.stats().failures >= 3)
    stats = writer.stats()
    assert (stats.available, stats.last_error, stats.pending, stats.dropped) == (False, "away", 12, 0)
    assert not writer.flush(0.05)
    table.away = False
    assert writer.flush(5)
    assert stored(table) == list(range(12))
    assert writer.stats().available
    writer.close(5)


def test_one_inconsistent_trace_does_not_take_its_batch_with_it() -> None:
    table = FakeTable()
    writer = TraceWriter(table, batch=5, flush_interval_s=30)
    for i in range(5):
        writer.append(replace(numbered(i), prompt_len=0 if i == 2 else 2), 1.0)
    assert writer.flush(5)
    assert stored(table) == [0, 1, 3, 4]
    stats = writer.stats()
    assert (stats.written, stats.dropped, stats.pending) == (4, 1, 0)
    assert "prompt_len" in (stats.last_error or "")
    writer.close(5)


def test_a_trace_the_table_refuses_is_counted_as_dropped() -> None:
    table = FakeTable()
    table.limits = replace(LIMITS, max_bytes=4000)
    writer = TraceWriter(table)
    writer.append(synthetic_trace(np.random.default_rng(0), n_response=200), 1.0)
    writer.append(TRACE, 1.0)
    assert writer.flush(5)
    assert (writer.stats().written, writer.stats().dropped) == (1, 1)
    writer.close(5)


@pytest.mark.parametrize("priority", [0.0, -1.0, float("nan"), float("inf")])
def test_a_senseless_priority_is_dropped_and_named_not_raised(priority: float) -> None:
    writer = TraceWriter(FakeTable())
    assert writer.append(TRACE, priority) is False
    assert "priority" in (writer.stats().last_error or "")
    assert writer.stats().dropped == 1
    writer.close(5)


def test_the_thread_outlives_a_fault_that_is_nobody_s_absence() -> None:
    table = FakeTable()
    table.fault = RuntimeError("a bug")
    writer = TraceWriter(table, batch=2, flush_interval_s=0.01)
    writer.append(numbered(0), 1.0)
    assert writer.flush(5)
    assert writer.stats().last_error == "RuntimeError: a bug"
    table.fault = None
    writer.append(numbered(1), 1.0)
    assert writer.flush(5)
    assert stored(table) == [1]
    assert (writer.stats().failures, writer.stats().dropped, writer.stats().written) == (1, 1, 1)
    writer.close(5)


def test_close_writes_what_waits_then_refuses_and_ends_its_thread() -> None:
    table = FakeTable()
    writer = TraceWriter(table, batch=100, flush_interval_s=30)
    for i in range(7):
        writer.append(numbered(i), 1.0)
    assert writer.close(5)
    assert writer.close(5)
    assert stored(table) == list(range(7))
    assert writer.append(TRACE, 1.0) is False
    assert not writer._thread.is_alive()


def test_close_beside_an_absent_table_keeps_its_deadline_and_counts_what_is_lost() -> None:
    table = FakeTable()
    table.away = True
    writer = TraceWriter(table, batch=4, flush_interval_s=0.01, backoff=Backoff(first_s=0.05, longest_s=30, factor=100))
    for i in range(10):
        writer.append(numbered(i), 1.0)
    wait_for(lambda: writer.stats().failures >= 2)  # now it would sleep for many seconds
    started = time.monotonic()
    assert not writer.close(0.3)
    assert time.monotonic() - started < 3
    stats = writer.stats()
    assert (stats.dropped, stats.pending, stats.written) == (10, 0, 0)
    assert not writer._thread.is_alive()


def test_closing_cuts_a_long_back_off_short() -> None:
    table = FakeTable()
    table.away = True
    writer = TraceWriter(table, flush_interval_s=0.01, backoff=Backoff(first_s=0.02, longest_s=60, factor=3000))
    writer.append(TRACE, 1.0)
    wait_for(lambda: writer.stats().failures >= 2)
    table.away = False
    assert writer.close(5)
    assert stored(table) == [0]


def test_flush_is_not_fooled_by_traces_that_were_never_queued() -> None:
    table = FakeTable()
    table.away = True
    writer = TraceWriter(table, flush_interval_s=0.01, backoff=QUICK)
    writer.append(TRACE, 1.0)
    writer.append(TRACE, float("nan"))
    assert not writer.flush(0.1)
    table.away = False
    assert writer.close(5)


def test_back_off_grows_to_its_limit_and_stays_finite() -> None:
    backoff = Backoff(first_s=0.1, longest_s=5.0, factor=2.0)
    for failures, longest in ((1, 0.1), (3, 0.4), (7, 5.0), (100_000, 5.0)):
        pauses = [backoff.pause(failures) for _ in range(50)]
        assert all(longest / 2 <= pause <= longest for pause in pauses), failures


@pytest.mark.parametrize("limits", [{"max_pending": 0}, {"batch": 0}, {"flush_interval_s": 0.0}])
def test_senseless_limits_are_refused(limits: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(limits))):
        TraceWriter(FakeTable(), **limits)  # type: ignore[arg-type]


@pytest.mark.redis
def test_a_redis_that_is_killed_and_comes_back_loses_no_trace_that_was_still_waiting(tmp_path: Path) -> None:
    server = start_embedded(tmp_path)
    table = RedisTable(server.url, "writer", LIMITS)
    writer = TraceWriter(table, batch=8, flush_interval_s=0.01, backoff=QUICK)
    writer.append(numbered(0), 1.0)
    assert writer.flush(5)

    os.kill(server.pid, signal.SIGKILL)
    wait_for(lambda: not server.alive())
    for i in range(1, 21):
        assert writer.append(numbered(i), 1.0)
    wait_for(lambda: not writer.stats().available)
    assert writer.stats().dropped == 0

    server.close()
    server = start_embedded(tmp_path)  # empty: killed before its first snapshot
    assert writer.flush(10)
    assert [s.trace.draft_version for s in table.fresh(0, 100)] == list(range(1, 21))
    stats = writer.stats()
    assert (stats.available, stats.written, stats.dropped) == (True, 21, 0)
    assert writer.close(5)
    table.close()
    server.close()
