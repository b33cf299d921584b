"""The way from a decoder to the replay table that decoding never waits for.

`append` puts a trace into a bounded queue and returns; one thread encodes and inserts in batches. If the table is gone,
the thread tries again with growing pauses, the queue drops its oldest traces, and everything dropped is counted. Fresh
traces are worth more than old ones, so the oldest goes first.
"""

import math
import random
import threading
import time
from collections import deque
from dataclasses import dataclass

from buffers.errors import TableUnavailable
from buffers.table import NO_KEY, ReplayTable
from buffers.trace import Trace


@dataclass(frozen=True, slots=True, kw_only=True)
class Backoff:
    """Pauses between attempts to reach a table that is gone: first, first * factor, ... up to longest, in seconds."""

    first_s: float = 0.1
    longest_s: float = 10.0
    factor: float = 2.0

    def pause(self, failures: int) -> float:
        """Seconds to wait after that many failures in a row, shortened at random by up to a half.

        The randomness keeps many decoders from returning to a restarted Redis in the same instant.
        """
        # The exponent is bounded only to keep the power finite; `longest_s` has won long before.
        return min(self.longest_s, self.first_s * self.factor ** min(failures - 1, 64)) * random.uniform(0.5, 1.0)


@dataclass(frozen=True, slots=True)
class WriterStats:
    """Counts since the writer was made. appended = written + dropped + pending."""

    appended: int
    written: int
    dropped: int  # lost: the queue was full, the trace was refused, or the writer was closed
    failures: int  # inserts that failed; tried again where the table was away, given up on any other fault
    pending: int
    available: bool  # whether the last insert reached the table
    last_error: str | None  # of the last failure or refusal; None if there was none


class TraceWriter:
    """A bounded queue and one thread in front of a table. Any thread may call any method."""

    def __init__(
        self,
        table: ReplayTable,
        *,
        max_pending: int = 4096,
        batch: int = 64,
        flush_interval_s: float = 0.5,
        backoff: Backoff | None = None,
    ) -> None:
        """Starts the thread.

        max_pending: traces kept waiting at most. batch: traces in one insert at most; that many are inserted at once,
        fewer after flush_interval_s seconds. Raises ValueError for a limit that makes no sense.
        """
        for name, value in (("max_pending", max_pending), ("batch", batch)):
            if value < 1:
                raise ValueError(f"{name} ({value}) must be at least 1")
        if not flush_interval_s > 0:
            raise ValueError(f"flush_interval_s ({flush_interval_s}) must be above 0")
        self._table = table
        self._max_pending = max_pending
        self._batch = batch
        self._flush_interval_s = flush_interval_s
        self._backoff = backoff or Backoff()
        self._changed = threading.Condition()
        self._queue: deque[tuple[Trace, float]] = deque()
        self._in_flight: list[tuple[Trace, float]] = []  # taken from the queue, not yet written or dropped
        self._accepted = self._written = self._lost = 0  # queued; of those stored; of those given up
        self._rejected = 0  # never queued
        self._failures = self._failures_in_row = 0
        self._flushing = 0  # callers waiting in flush()
        self._closing = False
        self._abandon = False
        self._last_error: str | None = None
        self._thread = threading.Thread(target=self._run, name="adaptd-trace-writer", daemon=True)
        self._thread.start()

    def append(self, trace: Trace, priority: float) -> bool:
        """Queues a trace. O(1); never blocks on the table, never raises for it.

        Returns False if a trace was lost: the oldest one waiting because the queue was full, or this one because the
        writer is closed or the priority is not finite and above 0.
        """
        with self._changed:
            if self._closing:
                return self._reject("the writer is closed")
            if not (math.isfinite(priority) and priority > 0):
                return self._reject(f"priority ({priority}) must be finite and above 0")
            full = len(self._queue) + len(self._in_flight) >= self._max_pending
            if full and not self._queue:
                return self._reject("the queue is full")  # everything that fits is being written right now
            if full:
                self._queue.popleft()
                self._lost += 1
            self._queue.append((trace, priority))
            self._accepted += 1
            if len(self._queue) == self._batch:
                self._changed.notify_all()
            return not full

    def stats(self) -> WriterStats:
        """The counts, consistent with each other."""
        with self._changed:
            return WriterStats(
                appended=self._accepted + self._rejected,
                written=self._written,
                dropped=self._lost + self._rejected,
                failures=self._failures,
                pending=len(self._queue) + len(self._in_flight),
                available=self._failures_in_row == 0,
                last_error=self._last_error,
            )

    def flush(self, timeout: float) -> bool:
        """Waits at most `timeout` seconds until everything appended before is written or dropped; whether it is."""
        with self._changed:
            goal = self._accepted
            self._flushing += 1
            self._changed.notify_all()
            try:
                return self._changed.wait_for(lambda: self._written + self._lost >= goal, timeout)
            finally:
                self._flushing -= 1

    def close(self, timeout: float) -> bool:
        """Refuses new traces, writes what is waiting for at most `timeout` seconds, drops the rest and counts it.

        Returns whether nothing was dropped by closing. Idempotent. The thread ends; if it hangs in a call to the table,
        it is left behind as a daemon thread.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        complete = self.flush(timeout)
        with self._changed:
            self._abandon = True
            self._lost += len(self._queue)
            self._queue.clear()
            self._changed.notify_all()
        self._thread.join(timeout=1.0)
        return complete

    # --- the thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while (batch := self._next_batch()) is not None:
            try:
                self._insert(batch)
            except TableUnavailable as exc:
                self._failed(exc)
                self._pause()
            except Exception as exc:
                self._give_up(exc)

    def _next_batch(self) -> list[tuple[Trace, float]] | None:
        """Waits for a full batch, the flush interval with anything at all, a flush() or close(); None is the end."""
        with self._changed:
            deadline = time.monotonic() + self._flush_interval_s
            while not self._abandon:
                left = deadline - time.monotonic()
                hurried = left <= 0 or self._flushing or self._closing
                if self._queue and (hurried or len(self._queue) >= self._batch):
                    batch = [self._queue.popleft() for _ in range(min(self._batch, len(self._queue)))]
                    self._in_flight = list(batch)
                    return batch
                # With an empty queue there is no deadline to keep: look again an interval later.
                self._changed.wait(left if left > 0 else self._flush_interval_s)
            return None

    def _insert(self, batch: list[tuple[Trace, float]]) -> None:
        """Inserts a batch; one by one if a trace in it is inconsistent, so that only that one is lost."""
        try:
            keys = self._table.insert([trace for trace, _ in batch], [priority for _, priority in batch])
        except ValueError as exc:
            if len(batch) == 1:
                self._settle(1, refused=1, reason=str(exc))
                return
            for item in batch:
                self._insert([item])
            return
        self._settle(len(keys), refused=keys.count(NO_KEY), reason="a trace exceeds half the table's byte budget")

    def _settle(self, n: int, *, refused: int, reason: str) -> None:
        """The first n traces in flight are dealt with: written, or refused by the table."""
        with self._changed:
            del self._in_flight[:n]
            self._written += n - refused
            self._lost += refused
            self._failures_in_row = 0
            if refused:
                self._last_error = reason
            self._changed.notify_all()

    def _failed(self, exc: TableUnavailable) -> None:
        """Puts what is in flight back where it was, the oldest first in line, unless the writer is being given up."""
        with self._changed:
            self._failures += 1
            self._failures_in_row += 1
            self._last_error = str(exc)
            if self._abandon:
                self._lost += len(self._in_flight)
            else:
                self._queue.extendleft(reversed(self._in_flight))
            self._in_flight = []

    def _give_up(self, exc: Exception) -> None:
        """Loses what is in flight: a fault that is not the table's absence would come back with every attempt."""
        with self._changed:
            self._failures += 1
            self._lost += len(self._in_flight)
            self._in_flight = []
            self._last_error = f"{type(exc).__name__}: {exc}"
            self._changed.notify_all()

    def _pause(self) -> None:
        """Waits before the next attempt; close() cuts the wait short and makes the following ones brief."""
        with self._changed:
            closing = self._closing
            seconds = self._backoff.first_s if closing else self._backoff.pause(self._failures_in_row)
            self._changed.wait_for(lambda: self._abandon or self._closing != closing, seconds)

    def _reject(self, reason: str) -> bool:
        self._rejected += 1
        self._last_error = reason
        return False
