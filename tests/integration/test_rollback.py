"""A version that the gate was told to let through whatever it does: live acceptance takes it back."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from adaptd.pocket.shipped import pocket_prompts
from checkpoints.store import CheckpointStore
from tests.integration.test_daemon import Served, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.redis]

RUINOUS = {
    "ADAPTD_GATE__MIN_GAIN": "-10",
    "ADAPTD_GATE__MAX_REGRESSION": "10",
    "ADAPTD_GATE__MIN_TRACES": "2",
    "ADAPTD_LEARN__LR": "5",
    "ADAPTD_LEARN__WARMUP_STEPS": "0",
    "ADAPTD_LEARN__AVERAGE_DECAY": "0",
    "ADAPTD_LEARN__KEEP_ANCHORS": "false",
    "ADAPTD_LEARN__INTERVAL_S": "100000",
    "ADAPTD_LEARN__MIN_NEW_TRACES": "40",
    # Or its requests would stay with the base draft, which serves them better.
    "ADAPTD_ADAPT__REQUEST_GATE": "false",
    # No tick for a drift: the watch alone is to answer.
    "ADAPTD_DRIFT__DELTA": "1e-12",
}


def rolled_back(daemon: Served, prompts: list[str]) -> tuple[list[dict[str, Any]], int]:
    """Traffic until the daemon goes back by itself; its events, and the requests that took."""
    with ThreadPoolExecutor(8) as clients:
        for start in range(0, 240, 8):
            list(clients.map(lambda prompt: daemon.ask(prompt, temperature=0.8), prompts[start : start + 8]))
            events: list[dict[str, Any]] = daemon.status()["events"]
            if any(e["kind"] == "rollback" for e in events):
                return events, start + 8
    raise AssertionError(json.dumps(events)[-2000:])


def test_a_draft_that_breaks_its_promise_is_rolled_back_by_itself_and_stays_out(tmp_path: Path) -> None:
    prompts = pocket_prompts("medical")
    daemon = Served(tmp_path, **RUINOUS)
    try:
        events, asked = rolled_back(daemon, prompts)
        kinds = [e["kind"] for e in events]
        assert "promoted" in kinds[: kinds.index("rollback")]
        assert asked <= 200, "40 to promote, then a bounded number"
        assert daemon.ask(prompts[0]).choices[0].message.content
        found = next(e for e in events if e["kind"] == "rollback")
        store = CheckpointStore(tmp_path / "default" / "checkpoints")
        assert store.manifest(1).gate["promote"], "the gate was told to"
        assert found["refused"][0] == 1
        assert store.manifest(found["version"]).is_reset, "what was before the first version is day 0"
        status = daemon.status()
        assert "1" in status["watch"]["quarantined"]
        assert "quarantined" in daemon.cli("status").stdout
        # The learner stands at day 0 too, whatever its last tick had made of the refused tensors.
        wait_for("the learner", lambda: daemon.status()["learner"]["restarts"] >= 1)
        metrics = httpx.get(f"{daemon.url}/metrics").text
        assert "adaptd_rollbacks_total 1.0" in metrics
        headers = {"authorization": "Bearer hush"}
        promote = f"{daemon.url}/adaptd/checkpoints/promote"
        refused = httpx.post(promote, json={"version": 1}, headers=headers, timeout=60)
        assert refused.status_code == 409
        assert "quarantined" in refused.json()["error"]["message"]
        assert daemon.stop() == 0
    finally:
        daemon.process.kill()
    again = Served(tmp_path, **{**RUINOUS, "ADAPTD_LEARN__MIN_NEW_TRACES": "100000"})
    try:
        assert "1" in again.status()["watch"]["quarantined"]
        cli = again.cli("checkpoints", "promote", "1")
        assert cli.returncode == 1
        assert "quarantined" in cli.stderr
        assert again.cli("checkpoints", "promote", "1", "--force").returncode == 0
        assert again.status()["watch"]["watching"], "what is forced is watched as any"
        assert "1" not in again.status()["watch"]["quarantined"]
        assert again.stop() == 0
    finally:
        again.process.kill()
