"""A daemon whose idle decoders ask the target for more than was asked: the learner gets it, and nobody else notices."""

from pathlib import Path

import httpx
import pytest

from tests.integration.test_daemon import Served, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.redis]

ASKED, AGAIN = 8, 2


def test_idle_decoders_answer_again_what_they_were_asked(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    # Nothing is learned meanwhile: what the buffer holds is what was answered.
    settings = {"ADAPTD_CAPTURE__AGAIN": str(AGAIN), "ADAPTD_LEARN__MIN_NEW_TRACES": "1000"}
    daemon = Served(tmp_path / "state", **settings)
    try:
        for i in range(ASKED):
            daemon.ask(f"What is asthma? {i}", temperature=0.8)
        daemon.ask("What is asthma?", temperature=0)

        def all_there() -> bool:
            status = daemon.status()
            buffer = status["buffer"]
            again = sum(d["engine"]["again"] for d in status["decoders"])
            # Whether the greedy one is among the reserved is left to chance.
            least = (ASKED - buffer["sizes"]["reserved"]) * AGAIN
            return bool(again >= least and buffer["inserted_total"] == ASKED + 1 + again)

        def figures() -> dict[str, float]:
            lines = httpx.get(f"{daemon.url}/metrics", timeout=30).text.splitlines()
            pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
            return {name: float(value) for name, value in pairs}

        wait_for("further answers", all_there)
        again = sum(d["engine"]["again"] for d in daemon.status()["decoders"])
        assert 0 < again <= ASKED * AGAIN
        wait_for("the figures", lambda: figures()["adaptd_answers_again_total"] == again)
        found = figures()
        assert found["adaptd_traces_written_total"] == ASKED + 1 + again
        asked = sum(value for name, value in found.items() if name.startswith("adaptd_requests_total"))
        assert asked == ASKED + 1, "no request was counted but those of clients"
        # Those given again were asked about too; not what the gate judges by, nor what had been held for long enough.
        unseen = daemon.status()["buffer"]["sizes"]["reserved"]
        assert 0 < found["adaptd_traces_asked_total"] <= ASKED + 1 + again - unseen
        decoders = daemon.status()["decoders"]
        assert not any(d["engine"]["held"] or d["engine"]["callback_errors"] for d in decoders)
        assert sum(d["engine"]["finished"] for d in decoders) == ASKED + 1
        assert daemon.stop() == 0
    finally:
        daemon.process.kill()
