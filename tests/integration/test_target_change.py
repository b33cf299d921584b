"""The daemon comes up again over the same folder with a fine-tuned target."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.integration.test_daemon import Served, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.redis]


def aged_out(daemon: Served) -> list[dict[str, Any]]:
    lines = Path(daemon.log.name).read_text().splitlines()
    return [json.loads(line[line.index("{") :]) for line in lines if "traces.aged_out" in line and "{" in line]


def test_another_target_over_the_same_folder_begins_with_an_empty_buffer(tmp_path: Path) -> None:
    settings = {"ADAPTD_LEARN__MIN_NEW_TRACES": "1000"}
    first = Served(tmp_path, **settings)
    try:
        for i in range(5):
            first.ask(f"Ann has {i + 2} apples and buys 3 more. How many?", seed=i)
        target = first.status()["decoders"][0]["target_id"]
    finally:
        assert first.stop() == 0
    again = Served(tmp_path, **settings)
    try:
        assert not aged_out(again), "the same target keeps its traces"
        assert sum(again.status()["buffer"]["sizes"].values()) >= 5
    finally:
        assert again.stop() == 0
    tuned = Served(tmp_path, ADAPTD_TARGET__MODEL="pocket-math", **settings)
    try:
        assert sum(tuned.status()["buffer"]["sizes"].values()) == 0
        (event,) = wait_for("the learner's line in the log", lambda: aged_out(tuned))
        assert event["traces"] == 5
        assert event["target_id"] == tuned.status()["decoders"][0]["target_id"] != target
        assert tuned.ask("Ann has 2 apples and buys 3 more. How many?").usage.completion_tokens > 0
    finally:
        assert tuned.stop() == 0
