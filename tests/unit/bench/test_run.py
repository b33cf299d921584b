"""`adaptd bench shift` from the command line to the result file, with the runs themselves replaced."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from adaptd.app import shift as app
from adaptd.bench import shift as shift_module
from adaptd.bench.learners import LearnerSpec
from adaptd.bench.run import Run, RunLog, run_key
from adaptd.bench.stream import Stream
from adaptd.cli.main import app as commands
from adaptd.config import load
from adaptd.errors import ConfigError


def sweep(
    _config: Any,
    _prompts: Any,
    streams: Sequence[Stream],
    specs: Sequence[LearnerSpec],
    seeds: Sequence[int],
    _jobs: int,
    _known: Any = None,
) -> Iterator[Run]:
    """A learner is as good as the stream is cold."""
    for stream in streams:
        n = sum(p.requests for p in stream.phases)
        for spec in specs:
            rounds = [10.0 + stream.temperature] * n
            yield Run(
                stream=stream.name,
                learner=spec.name,
                seed=seeds[0],
                lr=spec.settings.get("learn", {}).get("lr"),
                emitted=[20.0] * n,
                rounds=rounds,
                versions=[0] * n,
                trainable_fraction=0.0,
                trainable_bytes=0,
                bytes_per_position=1.0,
                tokens_per_s=None,
                learner_s=0.0,
                steps=0,
            )


@pytest.fixture
def shift(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(app.shift, "sweep", sweep)

    def run(*arguments: str) -> tuple[int, dict[str, Any], str]:
        out = tmp_path / "out.json"
        options = ["--report", str(tmp_path / "report"), "--json", str(out), "--seeds", "1", "--scale", "0.02"]
        done = CliRunner().invoke(commands, ["bench", "shift", *options, *arguments])
        return done.exit_code, json.loads(out.read_text()) if out.is_file() else {}, str(done.exception or done.output)

    return run


@pytest.mark.parametrize(("arguments", "temperature"), [((), 0.8), (("--temperature", "0"), 0.0)])
def test_the_temperature_overrides_that_of_every_stream_and_is_in_the_result(
    shift: Any, tmp_path: Path, arguments: Sequence[str], temperature: float
) -> None:
    code, found, _ = shift("--stream", "sharp", "--stream", "recur", "--learner", "frozen", *arguments)
    assert code == 0
    assert {s["temperature"] for s in found["streams"].values()} == {temperature}
    assert found["streams"]["sharp"]["learners"]["frozen"]["mal_by_phase"][0]["mean"] == pytest.approx(
        20 / (10 + temperature)
    )
    assert f"Temperature {temperature:g};" in (tmp_path / "report" / "shift.md").read_text()


def test_the_temperature_is_in_the_result_of_tuning_too(shift: Any) -> None:
    code, found, _ = shift("--stream", "sharp", "--learner", "ours", "--tune", "--temperature", "1")
    assert code == 0
    assert found["temperature"] == {"sharp": 1.0}
    assert found["tuning"]["ours"] == pytest.approx({"0.001": 20 / 11, "0.003": 20 / 11, "0.006": 20 / 11})


def test_a_negative_temperature_is_refused(shift: Any) -> None:
    code, found, _ = shift("--temperature", "-1")
    assert code == 2
    assert not found


def test_a_learner_that_cannot_run_is_refused_before_any_answer_is_generated(
    shift: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app.shift, "sweep", lambda *_: pytest.fail("answers would have been generated"))
    code, found, message = shift("--learner", "offline/top_64")
    assert code != 0
    assert "--set capture.k_top=64" in message
    assert not found


SPEC = LearnerSpec(name="ours", kind="cycle", about="one text")
STREAM = Stream.model_validate({"name": "s", "phases": [{"mix": {"math": 1}, "requests": 8}]})


def a_run(seed: int = 0) -> Run:
    return next(sweep(None, None, [STREAM], [SPEC], [seed], 1))


def test_a_run_is_known_by_what_was_asked_for() -> None:
    config = load(None)
    key = run_key(config, STREAM, SPEC, 0)
    assert key == run_key(load(None, ["state_dir=/elsewhere"]), STREAM, SPEC.model_copy(update={"about": "other"}), 0)
    others = [
        run_key(load(None, ["engine.k=3"]), STREAM, SPEC, 0),
        run_key(config, STREAM.scaled(2), SPEC, 0),
        run_key(config, STREAM, SPEC.with_rate(0.5), 0),
        run_key(config, STREAM, SPEC, 1),
    ]
    assert len({key, *others}) == 5


def test_finished_runs_come_back_from_the_file_but_for_one_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "runs.jsonl"
    RunLog(path).add("a", a_run(0))
    RunLog(path).add("b", a_run(1))
    found = RunLog(path)
    assert found.get("a") == a_run(0)
    assert found.get("c") is None
    path.write_text(path.read_text()[:-20])
    cut = RunLog(path)
    assert cut.get("a") == a_run(0)
    assert cut.get("b") is None


def test_a_file_of_something_else_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("dear diary\nnothing\n")
    with pytest.raises(ConfigError, match=r"notes\.txt, line 1: not a run of this benchmark"):
        RunLog(path)
    assert path.read_text() == "dear diary\nnothing\n"
    path.write_text("dear diary")
    with pytest.raises(ConfigError, match="not a file of runs"):
        RunLog(path)


def test_what_is_known_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[int] = []

    def serve(config: Any, files: Any, stream: Stream, spec: LearnerSpec, seed: int) -> Run:
        served.append(seed)
        return a_run(seed)

    monkeypatch.setattr(shift_module, "serve", serve)
    monkeypatch.setattr(shift_module, "fill", lambda *_: tmp_path)
    for seeds in ([0], [0, 1], [0, 1]):
        known = RunLog(tmp_path / "runs.jsonl")
        runs = list(shift_module.sweep(load(None), {"math": ["?"]}, [STREAM], [SPEC], seeds, 1, known))
        assert len(runs) == len(seeds)
    assert served == [0, 1]
