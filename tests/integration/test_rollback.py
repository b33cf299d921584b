"""A version that the gate was told to let through whatever it does: live acceptance takes it back."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from adaptd.pocket.shipped import pocket_prompts
from checkpoints.store import CheckpointStore
from tests.integration.test_daemon import Served

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


def test_a_draft_that_breaks_its_promise_is_rolled_back_by_itself(tmp_path: Path) -> None:
    daemon = Served(tmp_path, **RUINOUS)
    try:
        prompts = pocket_prompts("medical")
        with ThreadPoolExecutor(8) as clients:
            for start in range(0, 160, 8):
                list(clients.map(lambda prompt: daemon.ask(prompt, temperature=0.8), prompts[start : start + 8]))
                events = daemon.status()["events"]
                if any(e["kind"] == "rollback" for e in events):
                    break
        kinds = [e["kind"] for e in events]
        assert "rollback" in kinds, json.dumps(events)[-2000:]
        assert "promoted" in kinds[: kinds.index("rollback")]
        assert daemon.ask(prompts[0]).choices[0].message.content
        version = next(e["version"] for e in events if e["kind"] == "rollback")
        store = CheckpointStore(tmp_path / "default" / "checkpoints")
        assert store.manifest(1).gate["promote"], "the gate was told to"
        assert store.manifest(version).is_reset, "the parent of the first version is day 0"
        assert daemon.stop() == 0
    finally:
        daemon.process.kill()
