"""Logging set-up."""

import json
from pathlib import Path

import pytest
import structlog

from adaptd import events, log


def test_a_log_that_went_to_a_file_comes_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = structlog.get_config()
    with log.to_file(tmp_path / "log"):
        log.logger("here").info(events.LEARNER_TICKED, steps=3)
    assert structlog.get_config() == before
    (line,) = (tmp_path / "log").read_text().splitlines()
    assert json.loads(line)["steps"] == 3
    assert not capsys.readouterr().err
