"""Prompts asked again while nobody asks anything: no request waits for them, and they count nowhere."""

import dataclasses
import queue
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from adaptd.decoding.alternatives import Asking
from adaptd.decoding.capture import CaptureConfig
from adaptd.decoding.engine import SpeculativeDecoder
from adaptd.decoding.idle import HOLD_S, asked_again
from adaptd.decoding.loop import DecodeLoop
from adaptd.decoding.request import DecodeRequest, Delta, Finished, SamplingParams
from buffers.synthetic import synthetic_trace
from buffers.trace import Trace
from tests.unit.decoding.test_loop import WAIT_S, Client, FakeEngine, request, send
from tests.unit.decoding.tiny import greedy_reference, make_draft, make_model, make_prompts, serve


class Watched(FakeEngine):
    """Knows who was in each step."""

    def __init__(self) -> None:
        super().__init__(slots=6)
        self.seen: list[set[str]] = []

    def step(self) -> list[Delta]:
        self.seen.append(set(self.rows))
        return super().step()


@pytest.fixture
def engine() -> Watched:
    return Watched()


@pytest.fixture
def loop(engine: Watched) -> Iterator[DecodeLoop]:
    loop = DecodeLoop(engine, max_queue=3)
    yield loop
    engine.gate.set()
    loop.close(0.0)


def test_an_idle_loop_answers_them_and_counts_them_apart(loop: DecodeLoop, engine: Watched) -> None:
    ended: queue.Queue[Finished] = queue.Queue()
    for i in range(9):
        loop.submit_idle(request(f"{i}"), ended.put)
    found = {ended.get(timeout=WAIT_S).request_id for _ in range(9)}
    assert found == {f"{i}" for i in range(9)}
    assert max(map(len, engine.seen)) == 4, "no more together than a request may have to wait for"
    stats = loop.stats()
    assert stats.again == 9
    assert (stats.finished, stats.emitted, stats.row_rounds, stats.steps, stats.active) == (0, 0, 0, 0, 0)


def test_a_request_has_the_engine_to_itself_from_the_next_round_on(loop: DecodeLoop, engine: Watched) -> None:
    ended: queue.Queue[Finished] = queue.Queue()
    engine.gate.clear()
    loop.submit_idle(request("again", SamplingParams(temperature=0.0, max_tokens=40)), ended.put)
    assert engine.stepping.wait(WAIT_S)
    client = send(loop, "asked")
    assert loop.stats().queued == 1
    engine.gate.set()
    assert len(client.end().token_ids) == 3
    assert len(ended.get(timeout=WAIT_S).token_ids) == 40, "it began anew"
    at = [i for i, names in enumerate(engine.seen) if "asked" in names]
    assert at == [1, 2, 3], "one round after it came"
    assert all(engine.seen[i] == {"asked"} for i in at)
    stats = loop.stats()
    assert (stats.finished, stats.emitted, stats.again) == (1, 3, 1)


def test_closing_does_not_wait_for_them(loop: DecodeLoop, engine: Watched) -> None:
    loop.submit_idle(request("long", SamplingParams(temperature=0.0, max_tokens=10**9)), lambda _: None)
    assert engine.stepping.wait(WAIT_S)
    loop.close(WAIT_S)
    assert not loop.alive


def test_one_whose_receiver_raises_harms_nobody(loop: DecodeLoop) -> None:
    told = threading.Event()

    def refuse(_: Finished) -> None:
        told.set()
        raise OSError("no room")

    loop.submit_idle(request("again"), refuse)
    assert told.wait(WAIT_S)
    assert len(send(loop, "asked").end().token_ids) == 3
    assert loop.stats().callback_errors == 1


def test_of_too_many_the_newest_are_kept(loop: DecodeLoop, engine: Watched) -> None:
    engine.gate.clear()
    send(loop, "asked")
    assert engine.stepping.wait(WAIT_S)
    ended: queue.Queue[Finished] = queue.Queue()
    for i in range(1100):
        loop.submit_idle(request(f"{i}"), ended.put)
    engine.gate.set()
    found = {int(ended.get(timeout=WAIT_S).request_id) for _ in range(1024)}
    assert found == set(range(76, 1100))


def test_who_is_asked_again() -> None:
    trace = synthetic_trace(np.random.default_rng(0))
    asked = DecodeRequest("r", (1, 2), SamplingParams(temperature=0.7, top_p=0.9, seed=3), domain="math", tenant="t")
    first, second = asked_again(asked, trace, 2)
    assert (first.request_id, second.request_id) == ("r-again1", "r-again2")
    assert first.params == SamplingParams(temperature=0.7, top_p=0.9, seed=None), (
        "its own seed would give the same answer"
    )
    assert (first.prompt_ids, first.domain, first.tenant) == ((1, 2), "math", "t")
    assert asked_again(DecodeRequest("r", (1, 2), SamplingParams(temperature=0.0)), trace, 2) == []
    assert asked_again(asked, dataclasses.replace(trace, reserved=True), 2) == []


def test_answers_of_a_real_decoder_stay_what_they_are() -> None:
    target = make_model()
    prompts = make_prompts(8, 97)
    expected = greedy_reference(target, prompts, 12)
    engine = SpeculativeDecoder(
        target, make_draft(target), k=3, max_batch=3, max_length=80, prefill_tokens=8, capture=CaptureConfig()
    )
    loop, kept = DecodeLoop(engine), queue.Queue[Finished]()
    warm = SamplingParams(temperature=1.0, max_tokens=12)
    try:
        for i, prompt in enumerate(prompts):
            loop.submit_idle(DecodeRequest(f"{i}-again", prompt, warm), kept.put)
            client = Client()
            asked = DecodeRequest(str(i), prompt, SamplingParams(temperature=0.0, max_tokens=12))
            loop.submit(asked, client.on_delta, client.ends.put)
            assert list(client.end().token_ids) == expected[i]
        again = [kept.get(timeout=WAIT_S) for _ in prompts]
    finally:
        loop.close(WAIT_S)
    assert {f.request_id for f in again} == {f"{i}-again" for i in range(8)}
    for finished in again:
        assert finished.trace is not None
        finished.trace.validate()
        assert finished.trace.response_len == 12


def test_a_prompt_that_nobody_waits_for_is_not_read_to_its_end() -> None:
    """What gives way while its prompt is read does not keep the next request from being read."""
    target = make_model()
    engine = SpeculativeDecoder(target, make_draft(target), k=3, max_batch=2, max_length=90, prefill_tokens=4)
    params = SamplingParams(temperature=0.0, max_tokens=4)
    engine.add(DecodeRequest("long", make_prompts(1, 97, shortest=60, longest=60)[0], params))
    engine.step()
    assert engine.abort("long") is not None
    assert engine.active == 0
    short = make_prompts(1, 97, shortest=3, longest=3)[0]
    engine.add(DecodeRequest("short", short, params))
    assert engine.step(), "read and answered in its first step"
    done = serve(engine, [])
    assert list(done["short"].token_ids) == greedy_reference(target, [short], 4)[0]


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def held(name: str, domain: str = "math") -> Trace:
    return synthetic_trace(np.random.default_rng(0), request_id=name, domain=domain)


def branches(trace: Trace) -> int:
    return 0 if trace.branches is None else len(trace.branches.lens)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def timed(engine: Watched, clock: Clock) -> Iterator[DecodeLoop]:
    loop = DecodeLoop(engine, max_queue=3, clock=clock)
    yield loop
    engine.gate.set()
    loop.close(0.0)


def test_a_trace_goes_on_with_its_alternatives_where_nobody_asks(timed: DecodeLoop, engine: Watched) -> None:
    gone: queue.Queue[Trace] = queue.Queue()
    engine.passes = 3
    timed.hold(held("a"), gone.put)
    timed.hold(held("b", "nothing to ask"), gone.put)
    found = {t.request_id: branches(t) for t in (gone.get(timeout=WAIT_S) for _ in range(2))}
    assert found == {"a": 3, "b": 0}
    assert engine.asked == ["a"] * 3
    assert timed.stats().alternatives == 1


def test_alternatives_come_before_other_answers_and_the_newest_first(timed: DecodeLoop, engine: Watched) -> None:
    gone: queue.Queue[Trace] = queue.Queue()
    ended: queue.Queue[Finished] = queue.Queue()
    engine.gate.clear()
    client = send(timed, "asked")
    assert engine.stepping.wait(WAIT_S)
    for name in "ab":
        timed.hold(held(name), gone.put)
    timed.submit_idle(request("again"), ended.put)
    engine.gate.set()
    client.end()
    ended.get(timeout=WAIT_S)
    assert engine.asked == ["b", "a"]
    assert [gone.get(timeout=WAIT_S).request_id for _ in range(2)] == ["b", "a"]
    assert engine.seen[-1] == {"again"}


def test_a_request_waits_for_one_pass_alone_and_the_rest_is_asked_later(timed: DecodeLoop, engine: Watched) -> None:
    gone: queue.Queue[Trace] = queue.Queue()
    engine.passes = 4
    engine.gate.clear()
    timed.hold(held("a"), gone.put)
    client = send(timed, "asked")
    engine.gate.set()
    client.end()
    assert branches(gone.get(timeout=WAIT_S)) == 4
    assert len(engine.asked) == 4, "nothing is asked twice"


def test_other_answers_leave_the_slots_to_what_they_left_behind(timed: DecodeLoop, engine: Watched) -> None:
    """Each answer given again is held itself; the next ones begin when it has been asked about."""
    gone: queue.Queue[Trace] = queue.Queue()
    for i in range(12):
        timed.submit_idle(request(f"{i}"), lambda done: timed.hold(held(done.request_id), gone.put))
    found = {(t.request_id, branches(t)) for t in (gone.get(timeout=WAIT_S) for _ in range(12))}
    assert found == {(f"{i}", 1) for i in range(12)}


def test_a_target_that_cannot_be_asked_serves_on(timed: DecodeLoop, engine: Watched) -> None:
    gone: queue.Queue[Trace] = queue.Queue()

    def fail(_: Asking) -> bool:
        raise torch.OutOfMemoryError("no room for logits")

    engine.ask = fail  # type: ignore[method-assign]
    timed.hold(held("a"), gone.put)
    assert branches(gone.get(timeout=WAIT_S)) == 0
    assert len(send(timed, "asked").end().token_ids) == 3
    stats = timed.stats()
    assert (stats.callback_errors, stats.alternatives) == (1, 0)


def test_where_requests_leave_no_time_traces_go_on_without(timed: DecodeLoop, engine: Watched, clock: Clock) -> None:
    gone: queue.Queue[Trace] = queue.Queue()
    engine.gate.clear()
    send(timed, "long", SamplingParams(temperature=0.0, max_tokens=10**9))
    assert engine.stepping.wait(WAIT_S)
    timed.hold(held("a"), gone.put)
    engine.gate.set()
    clock.now += HOLD_S - 0.1
    timed.hold(held("b"), gone.put)
    assert timed.call(lambda _: None).result(WAIT_S) is None
    assert gone.empty()
    clock.now += 0.2
    assert gone.get(timeout=WAIT_S).request_id == "a"
    assert gone.empty()
    for i in range(70):
        timed.hold(held(f"{i}"), gone.put)
    rest = [gone.get(timeout=WAIT_S).request_id for _ in range(7)]
    assert rest == ["b", "0", "1", "2", "3", "4", "5"], "64 are held, the oldest go"
    timed.release().result(WAIT_S)
    assert [gone.get(timeout=WAIT_S).request_id for _ in range(64)] == [str(i) for i in range(6, 70)]
    assert engine.asked == []
    assert timed.stats().alternatives == 0


def test_what_is_held_when_a_loop_ends_is_not_lost(engine: Watched) -> None:
    loop, gone = DecodeLoop(engine), queue.Queue[Trace]()
    engine.gate.clear()
    send(loop, "asked")
    assert engine.stepping.wait(WAIT_S)
    loop.hold(held("a"), gone.put)
    engine.fail_with = RuntimeError("out of memory")
    engine.gate.set()
    assert gone.get(timeout=WAIT_S).request_id == "a"


def test_a_receiver_of_traces_that_raises_harms_nobody(timed: DecodeLoop) -> None:
    told = threading.Event()

    def refuse(_: Trace) -> None:
        told.set()
        raise OSError("no room")

    timed.hold(held("a"), refuse)
    assert told.wait(WAIT_S)
    assert len(send(timed, "asked").end().token_ids) == 3
    assert timed.stats().callback_errors == 1
