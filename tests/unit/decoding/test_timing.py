"""Timing the passes between rounds: nothing decoded changes, and the figures are of the batch that is there."""

from collections.abc import Iterator

import pytest

from adaptd.decoding.capture import CaptureConfig
from adaptd.decoding.engine import SpeculativeDecoder
from adaptd.decoding.loop import DecodeLoop
from adaptd.decoding.request import DecodeRequest, SamplingParams
from adaptd.decoding.timing import Calibration, StepTimes, measure
from policies.recall import Recall
from tests.unit.decoding.tiny import make_draft, make_model, make_prompts, serve

VOCAB = 97


def requests(temperature: float) -> list[DecodeRequest]:
    return [
        DecodeRequest(str(i), p, SamplingParams(temperature=temperature, max_tokens=12 + i % 5, seed=i))
        for i, p in enumerate(make_prompts(12, VOCAB))
    ]


def test_timing_between_rounds_changes_no_token_and_no_round() -> None:
    target = make_model(vocab=VOCAB)
    draft = make_draft(target, noise=0.02)
    for temperature in (0.0, 1.0):
        found = []
        for timed in (False, True):
            engine = SpeculativeDecoder(
                target, draft, k=3, max_batch=4, max_length=80, capture=CaptureConfig(), recall=Recall()
            )
            done = serve(engine, requests(temperature), (lambda _, e=engine, t=timed: t and measure(e)))
            found.append({name: (f.token_ids, f.stats.rounds, f.stats.accepted) for name, f in done.items()})
        assert found[0] == found[1]


def test_the_figures_are_those_of_each_pass() -> None:
    """A clock that moves by one for each position of a draft's pass and by ten for each of a target's."""
    target = make_model(vocab=VOCAB)
    engine = SpeculativeDecoder(target, make_draft(target), k=3, max_batch=4, max_length=80)
    now = [0.0]
    for runner, cost in ((engine._draft, 1.0), (engine._target, 10.0)):
        forward = runner.forward

        def counted(tokens, *args, forward=forward, cost=cost, **options):  # type: ignore[no-untyped-def]
            now[0] += cost * tokens.shape[0] * tokens.shape[1]
            return forward(tokens, *args, **options)

        runner.forward = counted  # type: ignore[method-assign]
    assert measure(engine, lambda: now[0]) == StepTimes(1, 3, 4 / 3, 10.0, 40.0), (
        "idle: one row, whose first pass has two"
    )
    for request in requests(0.0)[:4]:
        engine.add(request)
    assert measure(engine, lambda: now[0]) is None, "prompts are being read where the idle row would be"
    engine.step()
    found = measure(engine, lambda: now[0])
    assert found is not None
    batch = len(engine._rows)
    assert found == StepTimes(batch, 3, pytest.approx(4 / 3 * batch), 10.0 * batch, 40.0 * batch)


def test_each_size_of_batch_is_measured_once_and_again_when_it_is_old() -> None:
    now = [0.0]
    calibration = Calibration(lambda: now[0])
    assert calibration.due(0)
    calibration.put(StepTimes(1, 3, 0.1, 1.0, 1.2))
    assert [calibration.due(batch) for batch in (0, 1, 2, 3, 4)] == [False, False, True, True, True]
    calibration.put(StepTimes(3, 3, 0.1, 1.0, 1.2))
    assert [t.batch for t in calibration.all()] == [1, 3]
    assert not calibration.due(2)
    now[0] = 601.0
    assert calibration.due(1)


def test_the_loop_calls_between_rounds_and_survives_what_is_raised() -> None:
    class Engine:
        draft_version, recalled, active, draft_lengths = 0, 0, 0, {}

        def can_add(self) -> bool:
            return True

    def bad(engine: Engine) -> Iterator[int]:
        raise KeyError("x")

    loop = DecodeLoop(Engine())  # type: ignore[arg-type]
    assert loop.call(lambda engine: engine.draft_version).result(5) == 0
    assert isinstance(loop.call(bad).exception(5), KeyError)
    assert loop.call(lambda engine: 1).result(5) == 1
    assert loop.stats().round_s is None
    loop.close(0.0)
    assert loop.call(lambda engine: 1).exception(5) is not None
