"""What a decoder does while nobody asks: it asks the target for more of what it has served, for the learner.

A draft that has seen each answer a dozen times learns little more from the thirteenth look, and much from what the target
would have said behind other tokens (`adaptd.decoding.alternatives`) and from other answers to the same prompt
(docs/experiments.md, "Asked again"). Both are begun while no request is here, and one that comes waits for no more than the
pass or the round that is under way.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from adaptd.decoding.alternatives import Asking
from adaptd.decoding.request import DecodeRequest, Delta, Finished
from buffers.trace import Trace

T = TypeVar("T")
OnFinished = Callable[[Finished], None]
OnTrace = Callable[[Trace], None]

#: Answered together: a request that comes waits for one round over so many rows, at most.
_TOGETHER = 4
#: Requests that wait; one more drops the oldest, so that what is learned is of today's traffic.
_LIMIT = 1024
#: Traces that wait to have their alternatives asked about; one more lets the oldest go on without.
_HELD = 64
#: Seconds after which they go on without, where requests leave no time.
HOLD_S = 5.0


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


class IdleEngine(Protocol):
    """What is needed of a decoder."""

    def can_add(self) -> bool:
        """Whether there is a free slot."""

    def add(self, request: DecodeRequest) -> None:
        """Takes a request."""

    def abort(self, request_id: str) -> Finished | None:
        """Ends a request now."""

    def asking(self, trace: Trace) -> Asking | None:
        """What there is to ask the target about beside an answer; None: nothing."""

    def ask(self, asking: Asking) -> bool:
        """One short pass of the target over that, while there is no request; whether it was the last."""


@dataclass(slots=True)
class _Held:
    """A trace that waits for its alternatives."""

    trace: Trace
    on_trace: OnTrace
    since: float
    asking: Asking | None = None


class IdleLane:
    """What is done while there is no request. Everything but `put` and `hold` is for the thread that owns the engine."""

    def __init__(self) -> None:
        self._held: deque[_Held] = deque()
        self.alternatives = 0
        """Traces whose alternatives the target was asked about."""
        self._waiting: deque[tuple[DecodeRequest, OnFinished]] = deque(maxlen=_LIMIT)
        self._running: dict[str, tuple[DecodeRequest, OnFinished]] = {}
        self.answered = 0
        self.errors = 0
        """Callbacks that raised, and traces that could not be asked about."""

    @property
    def running(self) -> int:
        """Requests in the engine."""
        return len(self._running)

    @property
    def pending(self) -> int:
        """Requests in the engine, those that wait, and traces that are held."""
        return len(self._running) + len(self._waiting) + len(self._held)

    @property
    def held(self) -> int:
        """Traces that wait for their alternatives."""
        return len(self._held)

    def put(self, request: DecodeRequest, on_finished: OnFinished) -> None:
        """Queues a request."""
        self._waiting.append((request, on_finished))

    def hold(self, trace: Trace, on_trace: OnTrace, now: float) -> None:
        """Keeps a trace until its alternatives have been asked about."""
        self._held.append(_Held(trace, on_trace, now))

    def ask(self, engine: IdleEngine) -> bool:
        """One pass of the target for the newest trace that is held; whether there was any. Not beside other answers."""
        if self._running or not self._held:
            return False
        # The newest one's answer is still in the cache.
        held = self._held.pop()
        try:
            held.asking = held.asking or engine.asking(held.trace)
            done = held.asking is None or engine.ask(held.asking)
        except Exception:  # Out of memory, say: no reason to stop serving.
            self.errors += 1
            done = True
        if done:
            self._go_on(held)
        else:
            self._held.append(held)
        return True

    def release(self, before: float = math.inf) -> None:
        """Lets traces go on, with what was asked so far, that are held since `before` or are too many."""
        while self._held and (self._held[0].since <= before or len(self._held) > _HELD):
            self._go_on(self._held.popleft())

    def _go_on(self, held: _Held) -> None:
        trace = held.trace if held.asking is None else held.asking.answered()
        self.alternatives += trace is not held.trace
        self._told(held.on_trace, trace)

    def start(self, engine: IdleEngine) -> None:
        """Lets the engine have the next ones; none while traces are held, which need all slots."""
        while self._waiting and not self._held and len(self._running) < _TOGETHER and engine.can_add():
            # The newest first, as long as it is of use.
            request, on_finished = self._waiting.pop()
            engine.add(request)
            self._running[request.request_id] = request, on_finished

    def give_way(self, engine: IdleEngine) -> None:
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
            self._told(on_finished, finished)

    def _told(self, receiver: Callable[[T], None], value: T) -> None:
        try:
            receiver(value)
        except Exception:  # The receiver's own trouble.
            self.errors += 1
