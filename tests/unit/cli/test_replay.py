"""The options of `adaptd replay`."""

import pickle
import time
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from adaptd.cli.common import since_moment
from adaptd.cli.main import app
from adaptd.errors import LogRefused


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--regenerate", "--black-box"], "two teachers"),
        (["--regenerate", "--teacher", "auto"], "two teachers"),
        (["--teacher", "gold"], "'gold'"),
        (["--since", "yesterday"], "such as 7d"),
        (["--sample", "1.5"], "share below 1"),
        (["--sample", "0"], "share below 1"),
        (["--budget", "0"], "--budget"),
        (["--holdout", "0.9"], "--holdout"),
    ],
)
def test_an_option_out_of_range_is_a_usage_error(args: list[str], message: str) -> None:
    found = CliRunner().invoke(app, ["replay", "log", *args])
    assert found.exit_code == 2
    assert message in " ".join(found.output.split()).replace("│ ", "")


def test_an_age_and_a_time_are_since() -> None:
    assert since_moment("7d") == pytest.approx(time.time() - 7 * 86400, abs=5)
    assert since_moment("2026-01-02T03:04:05") == 1767323045
    assert since_moment("2026-01-02T04:04:05+01:00") == 1767323045
    assert since_moment(None) is None
    with pytest.raises(typer.BadParameter):
        since_moment("7 parsecs")


def test_a_pickle_is_refused_and_never_opened(tmp_path: Path) -> None:
    log, proof = tmp_path / "log.jsonl", tmp_path / "proof"

    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return open, (f"{proof}", "w")  # type: ignore[return-value]

    log.write_bytes(pickle.dumps(Bomb()))
    state = f"state_dir={tmp_path / 'state'}"
    found = CliRunner().invoke(app, ["replay", str(log), "--report", str(tmp_path / "report"), "--set", state])
    assert isinstance(found.exception, LogRefused)
    assert f"{log} is a pickle" in str(found.exception)
    assert not proof.exists()


def test_a_map_must_name_the_question() -> None:
    found = CliRunner().invoke(app, ["replay", "log", "--map", "response=a"])
    assert isinstance(found.exception, LogRefused)
    assert "--map must name the question" in str(found.exception)
