"""From answers to traces on a thread of its own: the proxy hands over what it saw and goes on."""

from __future__ import annotations

import queue
import threading
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from adaptd import events
from adaptd.log import logger
from adaptd.sidecar.answer import Seen
from adaptd.sidecar.steps import Figures
from adaptd.sidecar.traces import Incomplete, Provenance, build
from buffers.trace import Trace

_log = logger(__name__)


class Captured(NamedTuple):
    """What a trace is made of."""

    seen: Seen
    figures: Figures | None
    about: Provenance


class CaptureThread:
    """Builds traces and appends them to a writer. `put` never waits; a full queue refuses the newest.

    Args:
      append: `buffers.writer.TraceWriter.append`.
      max_pending: answers waiting at most.
    """

    def __init__(self, append: Callable[[Trace, float], bool], max_pending: int) -> None:
        self._append = append
        self._queue: queue.Queue[Captured | None] = queue.Queue(max_pending)
        self.built = 0
        self.dropped = 0
        """Answers that found the queue full."""
        self.refused: Counter[str] = Counter()
        """Answers that gave no trace, by reason."""
        self._thread = threading.Thread(target=self._run, name="adaptd-capture", daemon=True)
        self._thread.start()

    def put(self, item: Captured) -> bool:
        """Hand an answer over; False if it was dropped."""
        try:
            self._queue.put_nowait(item)
        except queue.Full:
            self.dropped += 1
            return False
        return True

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            try:
                for trace in build(*item):
                    self._append(trace, trace.surprise)
                    self.built += 1
            except Incomplete as error:
                self._refuse(item, str(error))
            except Exception as error:  # whatever an answer holds, the thread goes on
                self._refuse(item, type(error).__name__)
            finally:
                self._queue.task_done()

    def _refuse(self, item: Captured, reason: str) -> None:
        self.refused[reason] += 1
        _log.warning(events.TRACE_REFUSED, request_id=getattr(item.seen, "answer_id", None), reason=reason)

    def flush(self) -> None:
        """Wait until every answer handed over so far is built or refused."""
        self._queue.join()

    def close(self, timeout_s: float = 5.0) -> None:
        """Build what is waiting, then stop."""
        try:
            self._queue.put(None, timeout=timeout_s)
        except queue.Full:
            return
        self._thread.join(timeout_s)
