"""Two real HTTP servers behind the proxy: a canary, its traffic's verdict, a server that is killed. No learner, no Ray.

The servers are processes that look like vLLM; what the real one does is tested in tests/integration/vllm/.
"""

import asyncio
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from adaptd.app.metrics import Metrics
from adaptd.app.sidecar import SidecarDaemon
from adaptd.config import Config, load
from adaptd.learning.quarantine import refusals
from adaptd.sidecar.publish import PublishFollower
from tests.integration.fake_upstream import ROUNDS, question

pytestmark = [pytest.mark.redis]

ROOT = Path(__file__).parents[2]
#: Accepted of forty proposals, by version: 2 is ruined, and 3 is what going back publishes.
ACCEPTED = {0: 2 * ROUNDS, 1: 3 * ROUNDS, 2: ROUNDS // 2, 3: 3 * ROUNDS}


class FakePublisher:
    """Over HTTP, as the real one, but of a number."""

    def __init__(self, url: str) -> None:
        self.url, self.version = url, 0

    async def publish(self, version: int) -> None:
        async with httpx.AsyncClient(trust_env=False) as client:
            body = {"version": version, "accepted": ACCEPTED[version]}
            (await client.post(f"{self.url}/fake/publish", json=body)).raise_for_status()
        self.version = version


class FakePublication:
    """`adaptd.app.publication.Publication` without a vLLM behind it."""

    active = True

    def __init__(self, config: Config, store: Any, upstream: Any, *, part: str, **_: Any) -> None:
        self._follower = PublishFollower(store, FakePublisher(config.upstream.url))
        self._upstream, self._task = upstream, None
        assert part in ("0", "1")

    @property
    def version(self) -> int:
        return self._follower.version

    async def recover(self) -> bool:
        return False

    def start(self) -> None:
        self._task = asyncio.create_task(self._follow())

    async def _follow(self) -> None:
        while True:
            if self._upstream.up:
                await self._follower.poll()
            await asyncio.sleep(0.05)

    def status(self) -> dict[str, Any]:
        return {"active": True, "reason": "", "faults": 0}

    def swaps(self) -> dict[str, Any]:
        return {"swaps": 0, "refusals": 0, "last_pause_s": None, "max_pause_s": 0.0, "swapped_at": None}

    async def close(self) -> None:
        assert self._task is not None
        self._task.cancel()


def start(port: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.integration.fake_upstream", str(port)]
    process = subprocess.Popen(command, cwd=ROOT)
    for _ in range(200):
        try:
            socket.create_connection(("127.0.0.1", port), 0.2).close()
            return process
        except OSError:
            assert process.poll() is None
            time.sleep(0.1)
    raise AssertionError("the fake server did not start")


@pytest.fixture
def servers() -> Iterator[tuple[list[str], list[subprocess.Popen[bytes]]]]:
    ports = []
    for _ in range(2):
        with socket.create_server(("127.0.0.1", 0)) as free:
            ports.append(free.getsockname()[1])
    processes = [start(port) for port in ports]
    yield [f"http://127.0.0.1:{port}" for port in ports], processes
    for process in processes:
        process.kill()
        process.wait()


async def until(what: str, condition: Callable[[], Awaitable[Any]], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not await condition():
        assert time.monotonic() < deadline, f"timed out waiting for {what}"
        await asyncio.sleep(0.05)


def test_the_canarys_traffic_decides_and_a_killed_server_is_not_noticed(
    servers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    urls, processes = servers

    async def no_cluster(*_: Any) -> None:
        """There is nobody to learn."""

    monkeypatch.setattr(SidecarDaemon, "_join_cluster", no_cluster)
    listed = ", ".join(f'"{url}"' for url in urls)
    sets = [f"state_dir={tmp_path}", "engine.kind=vllm", f"upstream.urls=[{listed}]", "upstream.poll_s=0.1"]
    sets += ["learn.enabled=false"]
    monkeypatch.setattr("adaptd.app.sidecar.Publication", FakePublication)
    daemon = SidecarDaemon(load(None, sets))
    proxy = httpx.AsyncClient(transport=httpx.ASGITransport(daemon.proxy), base_url="http://p")

    async def ask(n: int) -> None:
        """`n` requests, some at a time; each must be answered."""
        for _ in range(n // 10):
            answers = await asyncio.gather(*(proxy.post("/v1/completions", json=question()) for _ in range(10)))
            assert all(answer.status_code == 200 for answer in answers)

    def promote(version: int) -> None:
        about: dict[str, Any] = {"window": {}, "config": {}, "scope_config": {}}
        gate = {"gain": {"mean": 0.4, "low": 0.3, "high": 0.5}}
        tensors = {"w": torch.tensor([float(version)])}
        found = daemon.store.publish(tensors, base_id="b", tokenizer_hash="t", scope="lora", gate=gate, **about)
        assert found.version == version
        daemon.watching.promoted(version, daemon.config.engine.k)

    async def at(*versions: int) -> bool:
        async with httpx.AsyncClient(trust_env=False) as client:
            found = [(await client.get(f"{url}/fake/state")).json()["draft"] for url in urls]
        return found == list(versions)

    def kinds() -> list[str]:
        return [event["kind"] for event in daemon.events]

    async def run() -> None:
        await daemon.start()
        await ask(40)
        promote(1)
        await until("the canary", lambda: at(1, 0))
        await ask(10)
        assert await at(1, 0), "ten requests decide nothing"
        while "confirmed" not in kinds():
            await ask(10)
        await until("the others", lambda: at(1, 1))
        confirmed = next(event for event in daemon.events if event["kind"] == "confirmed")
        assert confirmed["version"] == 1

        await ask(100)  # the window before the next one is of version 1
        promote(2)
        await until("the canary", lambda: at(2, 1))
        asked = 0
        while "rollback" not in kinds():
            await ask(10)
            asked += 10
            assert await at(2, 1) or "rollback" in kinds(), "a version on trial reaches no other server"
            await asyncio.sleep(0.01)
        assert asked <= 200
        await until("going back", lambda: at(3, 3))
        assert set(refusals(daemon.store)) == {2}
        status = await daemon.status()
        assert status["upstream"]["canary"] == urls[0]
        assert [server["draft_version"] for server in status["upstream"]["servers"]] == [3, 3]
        assert "2" in status["watch"]["quarantined"]
        metrics = Metrics(daemon).expose().decode()
        assert f'adaptd_upstream_server_draft_version{{server="{urls[1]}"}} 3.0' in metrics
        assert "adaptd_versions_quarantined 1.0" in metrics

        asking = asyncio.create_task(ask(150))
        await asyncio.sleep(0.2)
        processes[0].kill()
        await asking
        assert daemon.proxy.counts.unreachable == daemon.proxy.counts.broken == 0
        await until("the status", lambda: _down(daemon))
        assert daemon.ready()[0]
        await daemon.stop()
        await proxy.aclose()

    asyncio.run(run())


async def _down(daemon: SidecarDaemon) -> bool:
    servers = (await daemon.status())["upstream"]["servers"]
    return [server["up"] for server in servers] == [False, True]
