"""A daemon whose Redis is not there when it starts: it serves, says so, and learns once the server comes."""

import time
from pathlib import Path

import pytest

from buffers.embedded import start_embedded
from buffers.redis_series import RedisSeries
from tests.integration.test_daemon import Served, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.redis]


def test_serving_goes_on_without_redis_and_the_buffer_fills_once_it_is_there(tmp_path: Path) -> None:
    redis = tmp_path / "redis"
    redis.mkdir(mode=0o700)
    (tmp_path / "state").mkdir()
    daemon = Served(tmp_path / "state", ADAPTD_BUFFER__URL=f"unix://{redis}/redis.sock")
    server = None
    try:
        assert daemon.ask("What is asthma?").choices[0].message.content
        buffer = daemon.status()["buffer"]
        assert buffer["available"] is False
        assert "redis.sock" in buffer["error"]
        shown = daemon.cli("status")
        assert shown.returncode == 0
        assert "unavailable" in shown.stdout
        server = start_embedded(redis)
        assert server.url == f"unix://{redis}/redis.sock"
        wait_for("the buffer", lambda: daemon.status()["buffer"]["available"])
        for i in range(12):
            daemon.ask(f"What is asthma? {i}")
        wait_for("traces in the buffer", lambda: daemon.status()["buffer"]["inserted_total"] >= 12)
        wait_for("a learner tick", lambda: daemon.status()["learner"]["ticks"] >= 1)
        assert daemon.stop() == 0
        # The request that was answered without Redis is in the time series too, which outlives the daemon.
        (counts,) = RedisSeries(server.url, "default").read(time.time() - 600).counts.values()
        assert counts.sum(0)[0] == 13
    finally:
        daemon.process.kill()
        if server is not None:
            server.close()
