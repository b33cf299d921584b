"""The loop's life with a fake engine: order of actions, swaps, failures, back-pressure, closing."""

import queue
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from adaptd.decoding.alternatives import Asking
from adaptd.decoding.engine import SpeculativeDecoder
from adaptd.decoding.loop import Action, DecodeLoop
from adaptd.decoding.loop_stats import SwapResult
from adaptd.decoding.request import DecodeRequest, Delta, Finished, RequestStats, SamplingParams
from adaptd.errors import ContextLengthExceeded, DecoderStopped, Overloaded
from buffers.trace import Trace
from tests.unit.decoding.tiny import disturb, greedy_reference, make_draft, make_model, make_prompts

PARAMS = SamplingParams(temperature=0.0, max_tokens=3)
WAIT_S = 120.0  # a bound on hanging, not a time anything should take


def request(name: str, params: SamplingParams = PARAMS) -> DecodeRequest:
    return DecodeRequest(name, [1, 2], params)


class FakeEngine:
    """Emits one token a request a step, `max_tokens` of them; a step waits for the gate."""

    def __init__(self, slots: int = 2) -> None:
        self.draft_version = 0
        self.recalled = 0
        self.draft_lengths: dict[str, int] = {}
        self.slots = slots
        self.rows: dict[str, list[int]] = {}
        self.limits: dict[str, int] = {}
        self.gate = threading.Event()
        self.gate.set()
        self.stepping = threading.Event()
        self.fail_with: Exception | None = None
        self.steps = 0
        self.versions: list[int] = []
        self.asked: list[str] = []
        self.passes = 1
        """Of the target for each trace that is asked about."""

    @property
    def active(self) -> int:
        return len(self.rows)

    def can_add(self) -> bool:
        return len(self.rows) < self.slots

    def check(self, request: DecodeRequest) -> None:
        if len(request.prompt_ids) > 8:
            raise ContextLengthExceeded("too long")

    def add(self, request: DecodeRequest) -> None:
        assert self.can_add()
        self.rows[request.request_id] = []
        self.limits[request.request_id] = request.params.max_tokens

    def finished(self, name: str, reason: str) -> Finished:
        ids = self.rows.pop(name)
        stats = RequestStats(len(ids), 3 * len(ids), 0, len(ids), (0, 0, 0), (0, 0, 0), 0, 0)
        return Finished(name, tuple(ids), None, reason, stats, None, 2)

    def step(self) -> list[Delta]:
        self.stepping.set()
        assert self.gate.wait(WAIT_S)
        if self.fail_with is not None:
            raise self.fail_with
        self.steps += 1
        self.versions.append(self.draft_version)
        deltas = []
        for name in list(self.rows):
            self.rows[name].append(self.steps)
            done = self.finished(name, "length") if len(self.rows[name]) == self.limits[name] else None
            deltas.append(Delta(name, (self.steps,), "", done))
        return deltas

    def abort(self, request_id: str) -> Finished | None:
        return self.finished(request_id, "abort") if request_id in self.rows else None

    def asking(self, trace: Trace) -> Asking | None:
        if trace.domain == "nothing to ask":
            return None
        return Asking(trace, np.zeros(self.passes, np.int32), np.zeros(self.passes, np.uint32))

    def ask(self, asking: Asking) -> bool:
        assert not self.rows
        assert self.gate.wait(WAIT_S)
        self.asked.append(asking.trace.request_id)
        asking.ids.append(np.zeros((1, 2), np.int64))
        asking.logprobs.append(np.zeros((1, 2), np.float32))
        return asking.done == len(asking.at)


class Client:
    def __init__(self) -> None:
        self.deltas: list[Delta] = []
        self.ends: queue.Queue[Finished | Exception] = queue.Queue()

    def on_delta(self, delta: Delta) -> None:
        self.deltas.append(delta)
        if delta.finished is not None:
            self.ends.put(delta.finished)

    def end(self) -> Finished | Exception:
        return self.ends.get(timeout=WAIT_S)


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def loop(engine: FakeEngine):
    loop = DecodeLoop(engine, max_queue=3)
    yield loop
    engine.gate.set()
    loop.close(0.0)
    assert not loop.alive


def send(loop: DecodeLoop, name: str, params: SamplingParams = PARAMS) -> Client:
    client = Client()
    loop.submit(request(name, params), client.on_delta, client.ends.put)
    return client


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_requests_beyond_the_slots_wait_their_turn_and_all_finish(loop: DecodeLoop) -> None:
    clients = [send(loop, name) for name in "abc"]
    for client in clients:
        finished = client.end()
        assert isinstance(finished, Finished)
        assert len(finished.token_ids) == 3
        assert [delta.finished is None for delta in client.deltas] == [True, True, False]
    stats = loop.stats()
    assert (stats.finished, stats.emitted, stats.row_rounds, stats.queued, stats.active) == (3, 9, 9, 0, 0)


def test_an_idle_loop_waits_and_takes_no_steps(loop: DecodeLoop, engine: FakeEngine) -> None:
    assert loop.next_action() is Action.WAIT
    time.sleep(0.05)
    assert engine.steps == 0


def test_a_full_queue_is_refused(loop: DecodeLoop, engine: FakeEngine) -> None:
    engine.gate.clear()
    clients = [send(loop, "running")]
    assert engine.stepping.wait(WAIT_S)
    clients += [send(loop, name) for name in "abc"]
    with pytest.raises(Overloaded, match="3 requests are waiting"):
        send(loop, "d")
    engine.gate.set()
    assert all(isinstance(client.end(), Finished) for client in clients)


def test_what_can_never_be_served_is_refused_in_the_callers_thread(loop: DecodeLoop) -> None:
    with pytest.raises(ContextLengthExceeded):
        loop.submit(DecodeRequest("long", [1] * 9, PARAMS), lambda delta: None)


def test_two_outstanding_requests_need_two_ids(loop: DecodeLoop, engine: FakeEngine) -> None:
    engine.gate.clear()
    send(loop, "same")
    with pytest.raises(ValueError, match="same"):
        send(loop, "same")
    engine.gate.set()


def test_a_swap_waits_for_the_round_and_runs_before_the_next(loop: DecodeLoop, engine: FakeEngine) -> None:
    engine.gate.clear()
    client = send(loop, "a")
    assert engine.stepping.wait(WAIT_S)
    seen = []

    def apply() -> SwapResult:
        seen.append((engine.steps, engine.draft_version, threading.current_thread().name))
        return SwapResult(version=4)

    future = loop.request_swap(apply)
    assert not future.done()
    assert loop.next_action() is Action.SWAP
    engine.gate.set()
    result = future.result(WAIT_S)
    assert isinstance(client.end(), Finished)
    assert seen == [(1, 0, "adaptd-decode")]
    assert engine.versions == [0, 4, 4]
    assert result.version == 4
    assert result.pause_s >= 0
    stats = loop.stats()
    assert (stats.swaps, stats.swap_refusals, stats.draft_version, stats.max_pause_s) == (1, 0, 4, result.pause_s)


def test_a_refused_swap_keeps_the_version_and_decoding_goes_on(loop: DecodeLoop) -> None:
    def refuse() -> SwapResult:
        raise ValueError("another base model")

    with pytest.raises(ValueError, match="another base"):
        loop.request_swap(refuse).result(WAIT_S)
    assert isinstance(send(loop, "a").end(), Finished)
    stats = loop.stats()
    assert (stats.swaps, stats.swap_refusals, stats.draft_version) == (0, 1, 0)


def test_if_the_loop_dies_everyone_outstanding_gets_the_cause(loop: DecodeLoop, engine: FakeEngine) -> None:
    engine.gate.clear()
    clients = [send(loop, "running"), send(loop, "b")]
    assert engine.stepping.wait(WAIT_S)
    clients += [send(loop, "c"), send(loop, "d")]
    engine.fail_with = RuntimeError("device lost")
    pending = loop.request_swap(lambda: SwapResult(version=1))
    engine.fail_with, failure = None, engine.fail_with
    engine.step = _raising(failure)  # from the next round on: the swap above is done by then
    engine.gate.set()
    assert pending.result(WAIT_S).version == 1
    for client in clients:
        error = client.end()
        assert isinstance(error, DecoderStopped)
        assert "RuntimeError: device lost" in str(error)
        assert error.__cause__ is failure
        assert error.retry_after_s is not None
    until(lambda: not loop.alive)
    assert loop.failure is failure
    assert loop.stats().failed == 4
    with pytest.raises(DecoderStopped, match="device lost"):
        send(loop, "late")
    with pytest.raises(DecoderStopped, match="device lost"):
        loop.request_swap(lambda: SwapResult(version=2)).result(WAIT_S)


def _raising(error: Exception | None) -> Callable[[], list[Delta]]:
    def step() -> list[Delta]:
        assert error is not None
        raise error

    return step


def test_a_client_that_raises_loses_its_own_request_and_nothing_else(loop: DecodeLoop, engine: FakeEngine) -> None:
    def broken(delta: Delta) -> None:
        raise OSError("client went away")

    engine.gate.clear()
    loop.submit(request("broken"), broken)
    fine = send(loop, "fine")
    engine.gate.set()
    assert isinstance(fine.end(), Finished)
    until(lambda: loop.stats().active == 0)
    assert loop.stats().callback_errors == 1
    assert loop.alive


def test_an_abort_ends_a_running_and_a_waiting_request(loop: DecodeLoop, engine: FakeEngine) -> None:
    engine.gate.clear()
    endless = SamplingParams(max_tokens=10_000)
    running = send(loop, "running", endless)
    assert engine.stepping.wait(WAIT_S)
    other, waiting = send(loop, "other", endless), send(loop, "waiting")
    loop.abort("running")
    loop.abort("waiting")
    loop.abort("unknown")
    engine.gate.set()
    for client in (running, waiting):
        finished = client.end()
        assert isinstance(finished, Finished)
        assert finished.finish_reason == "abort"
    loop.abort("other")
    assert isinstance(other.end(), Finished)
    until(lambda: loop.next_action() is Action.WAIT)
    assert loop.stats().aborted == 3


def test_close_lets_requests_end_and_refuses_new_ones(loop: DecodeLoop, engine: FakeEngine) -> None:
    engine.gate.clear()
    clients = [send(loop, name) for name in "abc"]
    assert engine.stepping.wait(WAIT_S)
    closer = threading.Thread(target=loop.close, args=(WAIT_S,))
    closer.start()
    until(lambda: loop._deadline is not None)
    with pytest.raises(Overloaded, match="closing"):
        send(loop, "late")
    with pytest.raises(DecoderStopped, match="closing"):
        loop.request_swap(lambda: SwapResult(version=1)).result(WAIT_S)
    engine.gate.set()
    assert all(isinstance(client.end(), Finished) for client in clients)
    closer.join(WAIT_S)
    assert not loop.alive
    assert loop.failure is None


def test_close_fails_what_is_left_when_the_drain_time_is_over(loop: DecodeLoop) -> None:
    clients = [send(loop, name, SamplingParams(max_tokens=10**9)) for name in "abc"]
    loop.close(0.05)
    for client in clients:
        error = client.end()
        assert isinstance(error, DecoderStopped)
        assert "closing" in str(error)
    assert not loop.alive


def test_swaps_under_load_change_no_token_of_a_real_decoder() -> None:
    target = make_model(vocab=61)
    prompts = make_prompts(12, 61)
    answers = greedy_reference(target, prompts, 12)
    draft = make_draft(target)
    loop = DecodeLoop(SpeculativeDecoder(target, draft, k=3, max_batch=4, max_length=64), max_queue=20)
    clients = [Client() for _ in prompts]
    for at, (prompt, client) in enumerate(zip(prompts, clients, strict=True)):
        params = SamplingParams(temperature=0.0, max_tokens=12)
        loop.submit(DecodeRequest(str(at), prompt, params), client.on_delta, client.ends.put)
    for version in range(1, 9):

        def apply(version: int = version) -> SwapResult:
            disturb(draft, 0.02, version)
            return SwapResult(version=version)

        assert loop.request_swap(apply).result(WAIT_S).version == version
    for client, answer in zip(clients, answers, strict=True):
        finished = client.end()
        assert isinstance(finished, Finished)
        assert finished.token_ids == tuple(answer)
    loop.close(1.0)
    assert loop.stats().swaps == 8
