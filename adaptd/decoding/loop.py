"""The thread that owns a decoder: it steps, swaps and closes, one action at a time. Knows neither Ray nor HTTP.

    STEP   give waiting requests to the engine and play one round
    SWAP   run a prepared weight copy; only between rounds, and before the next one
    CALL   run something else with the engine, between rounds
    CLOSE  end: nothing is left to do, or the drain time is over
    WAIT   sleep until something is asked; an idle loop costs nothing

Because a swap is an action, weights never change between proposing and verifying. If the loop dies, every outstanding
request is told the cause, later ones are refused with it, and the exception is kept in `failure`.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from enum import Enum
from statistics import median
from typing import Any, Protocol, TypeVar

from adaptd.decoding.idle import HOLD_S, IdleEngine, IdleLane, OnFinished, OnTrace
from adaptd.decoding.loop_stats import LoopStats, SwapResult
from adaptd.decoding.request import DecodeRequest, Delta, Finished, RequestStats
from adaptd.errors import DecoderStopped, Overloaded
from buffers.trace import Trace

T = TypeVar("T")
#: Steps whose median is the time of a round: the few that also read prompts do not count.
_RECENT = 64

OnDelta = Callable[[Delta], None]
OnFailed = Callable[[Exception], None]


class Action(Enum):
    """What the loop does next."""

    STEP = "step"
    SWAP = "swap"
    CALL = "call"
    CLOSE = "close"
    WAIT = "wait"


class Engine(IdleEngine, Protocol):
    """What the loop needs of a decoder (`SpeculativeDecoder`)."""

    draft_version: int

    @property
    def recalled(self) -> int:
        """Contexts that are remembered."""

    @property
    def draft_lengths(self) -> dict[str, int]:
        """The k chosen last, by domain; empty where it is fixed. Any thread may ask."""

    @property
    def active(self) -> int:
        """Requests added that have not ended."""

    def check(self, request: DecodeRequest) -> None:
        """Raises if the request can never be served; safe from any thread."""

    def step(self) -> list[Delta]:
        """Plays a round."""


@dataclass(slots=True)
class _Client:
    on_delta: OnDelta
    on_failed: OnFailed | None


class DecodeLoop:
    """Runs an engine in a thread of its own.

    `on_delta` and `on_failed` are called from that thread and must be quick (put the value into a queue). An `on_delta`
    that raises ends its own request and nothing else.

    Args:
      engine: owned by the loop from here on.
      max_queue: requests that may wait for a slot.
      name: of the thread.
      clock: monotonic seconds.
    Raises: ValueError: max_queue is below 1.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        max_queue: int = 256,
        name: str = "adaptd-decode",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if max_queue < 1:
            raise ValueError(f"max_queue ({max_queue}) must be at least 1")
        self.failure: Exception | None = None
        """What the loop died of, if it did."""
        self._engine, self._max_queue, self._clock = engine, max_queue, clock
        self._wake = threading.Condition()
        self._queue: deque[DecodeRequest] = deque()
        self._clients: dict[str, _Client] = {}
        self._aborts: list[str] = []
        self._swaps: deque[tuple[Callable[[], SwapResult], Future[SwapResult]]] = deque()
        self._deadline: float | None = None
        self._idle = IdleLane()
        self._calls: deque[tuple[Callable[[Any], Any], Future[Any]]] = deque()
        self._recent: deque[tuple[float, int]] = deque(maxlen=_RECENT)
        self._stats = LoopStats(0, 0, engine.draft_version, 0, 0.0, *(0,) * 10, 0.0, 0.0)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    # -- any thread ----------------------------------------------------------------------------------------------

    def submit(self, request: DecodeRequest, on_delta: OnDelta, on_failed: OnFailed | None = None) -> None:
        """Queues a request. `on_delta` gets every Delta, the last with `finished`; or `on_failed` gets the cause.

        Raises:
          Overloaded: the queue is full, or the loop is closing.
          DecoderStopped: the loop has died.
          ValueError: a request of this id is outstanding; what `Engine.check` raises.
        """
        self._engine.check(request)
        with self._wake:
            if self.failure is not None:
                raise self._stopped()
            if self._deadline is not None:
                raise Overloaded("the decoder is closing and takes no more requests; retry elsewhere or later")
            if len(self._queue) >= self._max_queue:
                raise Overloaded(f"{len(self._queue)} requests are waiting already, the limit; retry later")
            if request.request_id in self._clients:
                raise ValueError(f"request_id ({request.request_id}) is outstanding; ids must differ")
            self._clients[request.request_id] = _Client(on_delta, on_failed)
            self._queue.append(request)
            self._wake.notify()

    def submit_idle(self, request: DecodeRequest, on_finished: OnFinished) -> None:
        """Queues a request that is answered while no other is here, and begins anew if one comes; of many the newest.

        `on_finished` is called as `on_delta` of `submit` is; never, where the loop ends first. Counts as `again` alone.

        Raises: ValueError: what `Engine.check` raises.
        """
        self._engine.check(request)
        with self._wake:
            self._idle.put(request, on_finished)
            self._wake.notify()

    def hold(self, trace: Trace, on_trace: OnTrace) -> None:
        """Hands a trace on once its alternatives have been asked about while no request was here, or after `HOLD_S` as it is."""
        with self._wake:
            self._idle.hold(trace, on_trace, self._clock())
            self._wake.notify()

    def abort(self, request_id: str) -> None:
        """Ends a request before the next round; its last Delta says `abort`. Unknown ids are ignored."""
        with self._wake:
            if request_id in self._clients:
                self._aborts.append(request_id)
                self._wake.notify()

    def request_swap(self, apply: Callable[[], SwapResult]) -> Future[SwapResult]:
        """Runs `apply` in the loop's thread before the next round; everything slow must have been done before.

        Returns: a future of its result with the pause filled in. If `apply` raises it must have changed nothing; the
        exception is the future's, the version stays, and decoding goes on.
        """
        future: Future[SwapResult] = Future()
        with self._wake:
            if self.failure is not None or self._deadline is not None:
                future.set_exception(self._stopped())
            else:
                self._swaps.append((apply, future))
                self._wake.notify()
        return future

    def call(self, work: Callable[[Any], T]) -> Future[T]:
        """Runs `work` with the engine in the loop's thread, between two rounds, which wait for it.

        Returns: a future of its result, or of what it raised; decoding goes on either way.
        """
        future: Future[T] = Future()
        with self._wake:
            if self.failure is not None or self._deadline is not None:
                future.set_exception(self._stopped())
            else:
                self._calls.append((work, future))
                self._wake.notify()
        return future

    def release(self) -> Future[None]:
        """Hands on every trace that is held, as it is; done when it has been."""
        return self.call(lambda _: self._idle.release())

    def stats(self) -> LoopStats:
        """Counts so far; never waits for a round."""
        with self._wake:
            recent = list(self._recent)
            return replace(
                self._stats,
                queued=len(self._queue),
                active=self._engine.active - self._idle.running,
                again=self._idle.answered,
                alternatives=self._idle.alternatives,
                held=self._idle.held,
                callback_errors=self._stats.callback_errors + self._idle.errors,
                draft_version=self._engine.draft_version,
                recalled=self._engine.recalled,
                draft_lengths=self._engine.draft_lengths,
                round_s=median(seconds for seconds, _ in recent) if recent else None,
                round_batch=median(batch for _, batch in recent) if recent else None,
            )

    def close(self, drain_s: float) -> None:
        """Takes no more requests, lets outstanding ones end for up to `drain_s` seconds, fails the rest and returns.

        Callable more than once; the earliest deadline holds. The round in progress is always finished.
        """
        with self._wake:
            deadline = self._clock() + drain_s
            self._deadline = deadline if self._deadline is None else min(self._deadline, deadline)
            self._wake.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def next_action(self) -> Action:
        """What the loop would do now. Swaps come first: the sooner, the fewer rounds run on old weights."""
        busy = bool(self._queue or self._aborts or self._engine.active > self._idle.running)
        if self._deadline is not None and (not busy or self._clock() >= self._deadline):
            return Action.CLOSE
        if self._swaps:
            return Action.SWAP
        if self._calls:
            return Action.CALL
        return Action.STEP if busy or self._idle.pending else Action.WAIT

    # -- the loop's thread ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while True:
                with self._wake:
                    while (action := self.next_action()) is Action.WAIT:
                        self._wake.wait()
                if action is Action.CLOSE:
                    break
                if action is Action.SWAP:
                    self._swap()
                elif action is Action.CALL:
                    self._call()
                else:
                    self._step()
        except Exception as exc:  # Whatever it was, nobody may be left waiting.
            with self._wake:
                self.failure = exc
        finally:
            self._release_everyone()

    def _step(self) -> None:
        with self._wake:
            aborts, self._aborts = self._aborts, []
        for request_id in aborts:
            self._abort(request_id)
        if self._idle.running and self._queue:
            self._idle.give_way(self._engine)
        while self._engine.can_add():
            with self._wake:
                request = self._queue.popleft() if self._queue else None
            if request is None:
                break
            self._engine.add(request)
        self._idle.release(self._clock() - HOLD_S)
        if self._engine.active == self._idle.running:
            if self._idle.ask(self._engine):
                return
            self._idle.start(self._engine)
        if not self._engine.active:
            return
        started = self._clock()
        deltas = self._engine.step()
        if self._idle.running:
            self._idle.settle(deltas)
            return
        self._count(deltas, self._clock() - started)
        for delta in deltas:
            self._deliver(delta)

    def _count(self, deltas: list[Delta], seconds: float) -> None:
        ended = [delta.finished for delta in deltas if delta.finished is not None]
        with self._wake:
            if deltas:
                self._recent.append((seconds, len(deltas)))
            now = self._stats
            self._stats = replace(
                now,
                steps=now.steps + 1,
                step_s=now.step_s + seconds,
                row_rounds=now.row_rounds + len(deltas),
                emitted=now.emitted + sum(len(delta.token_ids) for delta in deltas),
                proposed=now.proposed + sum(done.stats.proposed for done in ended),
                accepted=now.accepted + sum(done.stats.accepted for done in ended),
                finished=now.finished + len(ended),
            )

    def _deliver(self, delta: Delta) -> None:
        with self._wake:
            client = self._clients.get(delta.request_id)
            if delta.finished is not None:
                self._clients.pop(delta.request_id, None)
        if client is None:
            return
        try:
            client.on_delta(delta)
        except Exception:  # The client's own trouble; counted, and its request ends.
            with self._wake:
                self._stats = replace(self._stats, callback_errors=self._stats.callback_errors + 1)
                self._clients.pop(delta.request_id, None)
            if delta.finished is None:
                self._engine.abort(delta.request_id)

    def _abort(self, request_id: str) -> None:
        finished = self._engine.abort(request_id)
        with self._wake:
            waiting = next((request for request in self._queue if request.request_id == request_id), None)
            if waiting is not None:
                self._queue.remove(waiting)
                nothing = RequestStats(0, 0, 0, 0, (), (), -1, -1)
                finished = Finished(request_id, (), "", "abort", nothing, None, len(waiting.prompt_ids))
            if finished is None:
                return
            self._stats = replace(self._stats, aborted=self._stats.aborted + 1)
        self._deliver(Delta(request_id, (), "", finished))

    def _swap(self) -> None:
        with self._wake:
            apply, future = self._swaps.popleft()
        started = self._clock()
        try:
            result = apply()
        except Exception as exc:  # A refusal: the old weights and the old version stay.
            with self._wake:
                self._stats = replace(self._stats, swap_refusals=self._stats.swap_refusals + 1)
            future.set_exception(exc)
            return
        self._engine.draft_version = result.version
        pause = self._clock() - started
        with self._wake:
            now = self._stats
            self._stats = replace(now, swaps=now.swaps + 1, last_pause_s=pause, max_pause_s=max(now.max_pause_s, pause))
        future.set_result(replace(result, pause_s=pause))

    def _call(self) -> None:
        with self._wake:
            work, future = self._calls.popleft()
        try:
            future.set_result(work(self._engine))
        except Exception as exc:  # The caller's own trouble.
            future.set_exception(exc)

    def _release_everyone(self) -> None:
        """Nobody waits for a loop that has ended."""
        self._idle.release()
        with self._wake:
            if self._deadline is None:
                self._deadline = self._clock()
            clients, self._clients = self._clients, {}
            left: list[Future[Any]] = [future for _, future in (*self._swaps, *self._calls)]
            self._swaps, self._calls = deque(), deque()
            self._queue.clear()
            self._stats = replace(self._stats, failed=self._stats.failed + len(clients))
        for client in clients.values():
            if client.on_failed is None:
                continue
            try:
                client.on_failed(self._stopped())
            except Exception:  # As in `_deliver`: the others must still be told.
                with self._wake:
                    self._stats = replace(self._stats, callback_errors=self._stats.callback_errors + 1)
        for future in left:
            future.set_exception(self._stopped())

    def _stopped(self) -> DecoderStopped:
        """The error for those who wait or come too late, with the loop's own failure as its cause."""
        if self.failure is None:
            return DecoderStopped("the decoder is closing; retry the request")
        error = DecoderStopped(f"the decoder died ({type(self.failure).__name__}: {self.failure}); retry the request")
        error.__cause__ = self.failure
        return error
