"""The cores of `benchmarks/step.py`, `trainer.py`, `busy.py` and `scale.py`, on a tiny pair; the figures are theirs to make."""

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adaptd.decoding.engine import SpeculativeDecoder
from adaptd.decoding.request import DecodeRequest, SamplingParams
from adaptd.learning.learner import DraftLearner
from adaptd.models.scope import AdaptedDraft, ScopeConfig
from buffers.synthetic import synthetic_trace
from buffers.trace import Trace
from tests.unit.learning.conftest import Decode, tiny

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


@pytest.fixture
def traces(draft: Any, decode: Decode) -> list[Trace]:
    return [f.trace for f in decode(draft, 8, temperature=1.0, max_tokens=8) if f.trace is not None]


def test_a_step_learns_from_seven_traces_and_an_anchor(script: Any) -> None:
    rng = np.random.default_rng(0)
    fresh, anchors = ([synthetic_trace(rng) for _ in range(n)] for n in (9, 3))
    step = script("step")
    batches = [step.batch(fresh, anchors, number) for number in (0, 1)]
    for samples in batches:
        assert [s.info.stratum for s in samples] == ["recent"] * 7 + ["anchors"]
    assert batches[0][0].trace is not batches[1][0].trace


def test_the_trainers_take_turns_and_are_compared_within_a_round(script: Any) -> None:
    trainer = script("trainer")
    asked: list[str] = []

    class Fake:
        def __init__(self, name: str, rates: list[float]) -> None:
            self.name, self.rates = name, iter(rates)

        def run(self, batches: Any) -> Any:
            asked.append(self.name)
            return trainer.Timed(int(10 * next(self.rates)), 10.0, generated=1)

    # The machine is three times as slow in the last round; the ratios are not.
    contestants = {"adaptd": Fake("adaptd", [60, 60, 20]), "other": Fake("other", [10, 12, 4])}
    ours, other = trainer.summarise(trainer.play(contestants, [], 3))
    assert asked == ["adaptd", "other", "other", "adaptd", "adaptd", "other"]
    assert (ours["adaptd_times_faster"], ours["trained_tokens_per_s"]) == (1.0, 60.0)
    assert other["ratios"] == [6.0, 5.0, 5.0]
    assert (other["adaptd_times_faster"], other["generating_steps"]) == (5.0, 3)


def test_our_tokens_are_those_whose_loss_is_taken(script: Any, traces: list[Trace]) -> None:
    trainer, step = script("trainer"), script("step")
    draft = AdaptedDraft(tiny(1), ScopeConfig(width=8), serving=False)
    ours = trainer.Ours(DraftLearner(draft, objective="tv", lr=1e-3))
    timed = ours.run([[step.sample(t.without_branches(), "recent") for t in traces]] * (trainer.WARM + 2))
    assert timed.tokens == 2 * sum(len(t.tokens) - t.prompt_len for t in traces)
    row = trainer.row(traces[0])
    assert row["completion_mask"].count(1) == len(traces[0].tokens) - traces[0].prompt_len
    assert len(row["completion_mask"]) == len(row["input_ids"])


def test_without_trl_the_remedy_is_named(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = script("trainer")
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(SystemExit, match=rf"pip install trl=={trainer.TRL}"):
        trainer.require_trl()


def test_inter_token_times_lie_between_two_pieces_of_one_answer(script: Any, target: Any, draft: Any) -> None:
    busy = script("busy")
    engine = SpeculativeDecoder(target, draft, k=3, max_batch=2, max_length=64)
    params = SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True)
    some = [DecodeRequest(str(i), (i + 1, 2, 3), params) for i in range(5)]
    timed = busy.decode(engine, some)
    assert timed.tokens == 5 * 9
    # An answer of r pieces has r - 1 times between them, and a piece one to four tokens.
    assert 5 * (9 / 4 - 1) <= len(timed.gaps) <= 5 * 8
    assert sum(timed.gaps) < 2 * timed.seconds


def test_busy_rounds_are_compared_with_their_idle_neighbours(script: Any) -> None:
    busy = script("busy")

    def timed(rate: float, steps: int = 0) -> Any:
        return busy.Timed(int(rate), 1.0, [1 / rate] * 4, steps, 0.5 if steps else 0.0)

    rows = busy.summarise([(timed(100), timed(90, 3)), (timed(50), timed(50, 3)), (timed(200), timed(190, 3))])
    ratio = rows["tokens_per_s_ratio"]
    assert [round(ratio[k], 3) for k in ("low", "median", "high")] == [0.9, 0.95, 1.0]
    assert rows["idle"]["tokens_per_s"] == 100
    assert (rows["busy"]["steps_per_s"], rows["busy"]["learner_share"]) == (3.0, 0.5)


def test_a_fan_out_is_over_when_the_last_decoder_serves(script: Any) -> None:
    scale = script("scale")
    times = ((1.0, 9.0), (3.0, 5.0), (2.0, 4.0))
    found = [{"written_ms": 0.5, "first_ms": a, "last_ms": b, "pause_ms": 1.0} for a, b in times]
    medians = {"written_ms": 0.5, "first_ms": 2.0, "last_ms": 5.0, "pause_ms": 1.0}
    assert scale.summary(found) == medians | {"longest_ms": 9.0}
