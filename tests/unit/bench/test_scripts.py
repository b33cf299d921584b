"""The cores of scripts in `benchmarks/`, on a tiny pair; the figures are theirs to make."""

import importlib
import sys
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adaptd.decoding.capture import CaptureConfig
from adaptd.decoding.engine import SpeculativeDecoder
from adaptd.decoding.request import DecodeRequest, SamplingParams
from adaptd.learning.learner import DraftLearner
from adaptd.models.scope import AdaptedDraft, ScopeConfig
from buffers.synthetic import synthetic_trace
from buffers.trace import Trace
from policies.recall import Recall
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


def test_the_parts_of_a_round_are_counted_once_each(script: Any, target: Any, draft: Any) -> None:
    """A clock that moves by one whenever it is read: a part takes one, and one more for each part that it calls."""
    parts, reads = script("round"), count()
    engine = SpeculativeDecoder(
        target, draft, k=3, max_batch=1, max_length=64, capture=CaptureConfig(), recall=Recall(entries=64)
    )
    watch = parts.Watch(engine, lambda: float(next(reads)))
    params = SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True)
    found = watch.rounds([DecodeRequest(str(i), (i + 1, 2, 3), params) for i in range(2)])
    # Three looks at the recall and one that settles; the draft has the three inside it, the step all else.
    assert found[0] == {"target": 1.0, "draft": 4.0, "recall": 4.0, "capture": 1.0, "rest": 5.0}
    assert all(r == found[0] for r in found), "no round that reads a prompt is among them"
    # The first round of a request reads its prompt; at most four tokens a round.
    assert 2 * (9 / 4 - 1) <= len(found) <= 2 * 8
    assert parts.middle(found) == {**found[0], "round": 15.0}


def test_busy_requests_are_compared_with_both_their_idle_neighbours(script: Any) -> None:
    busy = script("busy")

    def timed(rate: float, steps: int = 0) -> Any:
        return busy.Timed(int(rate), 1.0, [1 / rate] * 4, steps, 0.5 if steps else 0.0)

    def unit(before: float, working: float, after: float) -> Any:
        return timed(before), timed(working, 3), timed(after)

    # A machine that grows slower all the time: what is busy costs a tenth, and the rest is the machine's.
    row = busy.summarise([unit(400, 180, 100), unit(900, 270, 100), unit(1600, 360, 100)])
    ratio = row["ratio"]
    assert [round(ratio["tokens_per_s"][k], 3) for k in ("ratio", "low", "high")] == [0.9, 0.9, 0.9]
    assert [round(ratio["idle_tokens_per_s"][k], 3) for k in ("low", "ratio", "high")] == [0.062, 0.111, 0.25]
    assert (row["idle"]["tokens_per_s"], row["busy"]["tokens_per_s"]) == (250.0, 270.0)
    assert row["busy"]["itl_p50_ms"] == pytest.approx(1e3 / 270)
    assert ratio["itl_p99_ms"]["ratio"] == pytest.approx(row["busy"]["itl_p99_ms"] / row["idle"]["itl_p99_ms"])
    assert (row["steps_per_s"], row["learner_share"]) == (3.0, 0.5)


def test_a_fan_out_is_over_when_the_last_decoder_serves(script: Any) -> None:
    scale = script("scale")
    times = ((1.0, 9.0), (3.0, 5.0), (2.0, 4.0))
    found = [{"written_ms": 0.5, "first_ms": a, "last_ms": b, "pause_ms": 1.0} for a, b in times]
    medians = {"written_ms": 0.5, "first_ms": 2.0, "last_ms": 5.0, "pause_ms": 1.0}
    assert scale.summary(found) == medians | {"longest_ms": 9.0}
