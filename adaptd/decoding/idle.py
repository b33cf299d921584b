"""What a decoder does while nobody asks: it answers prompts of its traffic once more, for the learner.

A draft that has seen each answer a dozen times learns little more from the thirteenth look, and much from another answer of
the target to the same prompt (docs/experiments.md, "Asked again"). Such answers cost no request anything: they are begun
while none is here, and end when one comes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from adaptd.decoding.request import DecodeRequest, Delta, Finished
from buffers.trace import Trace

OnFinished = Callable[[Finished], None]

#: Answered together: a request that comes waits for one round over so many rows, at most.
_TOGETHER = 4
#: Requests that wait; one more drops the oldest, so that what is learned is of today's traffic.
_LIMIT = 1024


def asked_again(request: DecodeRequest, trace: Trace, times: int) -> list[DecodeRequest]:
    """The request that has left `trace`, so many times more, each with a random seed of its own.

    None of a greedy request, whose answer would be the same, and none of a prompt that the gate judges by: nothing that
    is learned from may come of it.
    """
    if request.params.greedy or trace.reserved:
        return []
    params = replace(request.params, seed=None)
    return [
        replace(request, request_id=f"{request.request_id}-again{number}", params=params)
        for number in range(1, times + 1)
    ]


class Engine(Protocol):
    """What is needed of a decoder."""

    def can_add(self) -> bool:
        """Whether there is a free slot."""

    def add(self, request: DecodeRequest) -> None:
        """Takes a request."""

    def abort(self, request_id: str) -> Finished | None:
        """Ends a request now."""


class IdleLane:
    """Requests that are answered while there is no other. Everything but `put` is for the thread that owns the engine."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[DecodeRequest, OnFinished]] = deque(maxlen=_LIMIT)
        self._running: dict[str, tuple[DecodeRequest, OnFinished]] = {}
        self.answered = 0
        self.errors = 0
        """Callbacks that raised."""

    @property
    def running(self) -> int:
        """Requests in the engine."""
        return len(self._running)

    @property
    def pending(self) -> int:
        """Requests in the engine, and those that wait."""
        return len(self._running) + len(self._waiting)

    def put(self, request: DecodeRequest, on_finished: OnFinished) -> None:
        """Queues a request."""
        self._waiting.append((request, on_finished))

    def start(self, engine: Engine) -> None:
        """Lets the engine have the next ones."""
        while self._waiting and len(self._running) < _TOGETHER and engine.can_add():
            # The newest first, as long as it is of use.
            request, on_finished = self._waiting.pop()
            engine.add(request)
            self._running[request.request_id] = request, on_finished

    def give_way(self, engine: Engine) -> None:
        """Takes all of them out of the engine; they begin anew later."""
        for name, waiting in self._running.items():
            engine.abort(name)
            self._waiting.append(waiting)
        self._running.clear()

    def settle(self, deltas: Sequence[Delta]) -> None:
        """What a round over them gave."""
        for finished in (delta.finished for delta in deltas if delta.finished is not None):
            _, on_finished = self._running.pop(finished.request_id)
            self.answered += 1
            try:
                on_finished(finished)
            except Exception:  # The receiver's own trouble.
                self.errors += 1
