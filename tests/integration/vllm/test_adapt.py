"""The whole loop in front of a real server: traffic shifts, and by vLLM's own counters acceptance comes back."""

import asyncio
import json
from collections.abc import Iterator
from functools import partial

import httpx
import pytest

from adaptd.pocket.shipped import pocket_prompts
from adaptd.sidecar.client import VllmClient
from adaptd.sidecar.publisher import Publisher
from checkpoints.store import CheckpointStore
from tests.integration.vllm.daemon import ServedDaemon, chat, counted, wait_for
from tests.integration.vllm.helpers import Draft
from tests.integration.vllm.server import VllmServer

pytestmark = [pytest.mark.vllm, pytest.mark.ray, pytest.mark.redis, pytest.mark.slow]

QUESTIONS = pocket_prompts("math")
LAST, SHIFTED = QUESTIONS[:100], QUESTIONS[100:]


@pytest.fixture(scope="module")
def daemon(server: VllmServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedDaemon]:
    server.to_day_zero()
    served = ServedDaemon(tmp_path_factory.mktemp("adapt"), server.url)
    yield served
    served.end()


def test_acceptance_on_shifted_traffic_comes_back_by_the_servers_own_counters(
    server: VllmServer, daemon: ServedDaemon
) -> None:
    """The last hundred requests, none of which was ever sent before, against the same hundred before any version."""
    plain, before = asyncio.run(counted(server.url, server.url, LAST))
    daemon.start()
    for times in range(5):
        _, window = asyncio.run(counted(server.url, daemon.url, SHIFTED))
        status = daemon.status()
        print(
            f"{(times + 1) * len(SHIFTED)} requests: MAL {window.mal:.3f}, version {status['publisher']['version']}, "
            f"learner {status['learner'] and status['learner']['steps']} steps"
        )
        if (status["publisher"]["version"] or 0) >= 2:  # how soon is up to the machine
            break
    answers, after = asyncio.run(counted(server.url, daemon.url, LAST))
    assert before.mal is not None
    assert after.mal is not None
    print(f"last hundred: MAL {after.mal:.3f}, day 0 {before.mal:.3f}, ratio {after.mal / before.mal:.3f}")
    print([(e["kind"], {k: v for k, v in e.items() if k not in ("at", "kind")}) for e in daemon.status()["events"]])
    assert answers == plain, "not one token is another"
    assert after.mal >= 1.15 * before.mal


def test_status_metrics_and_doctor_show_the_publisher(server: VllmServer, daemon: ServedDaemon) -> None:
    """Second in the file: a version is in the server."""
    publisher = daemon.status()["publisher"]
    assert publisher["active"]
    assert publisher["version"] >= 1
    assert publisher["target_tensors_checked"]
    shown = daemon.cli("status")
    assert f"version {publisher['version']} in the server" in shown.stdout.replace("\n", " ")
    metrics = httpx.get(f"{daemon.url}/metrics", timeout=10).text
    where = f'server="{daemon.status()["upstream"]["url"]}"'
    assert f"adaptd_publisher_active{{{where}}} 1.0" in metrics
    assert f"adaptd_publisher_version{{{where}}} {publisher['version']:.1f}" in metrics
    assert f'adaptd_publisher_target_tensors{{kind="checked",{where}}}' in metrics
    checks = {c["name"]: c for c in json.loads(daemon.cli("doctor", "--json").stdout)}
    wrong = {name: c["found"] for name, c in checks.items() if c["state"] != "ok"}
    assert not wrong
    assert {"publishing", "plugin", "draft folder", "development routes"} <= checks.keys()


def test_a_daemon_that_starts_again_brings_its_version_in_again(
    server: VllmServer, daemon: ServedDaemon, draft: Draft
) -> None:
    """Meanwhile others have put day 0 into the server."""
    assert daemon.stop() == 0
    # Read after the stop: a last tick may have published another one meanwhile.
    version = CheckpointStore(daemon.home / "checkpoints").current()

    async def others() -> None:
        client = VllmClient(server.url)
        await Publisher(client, partial(asyncio.to_thread, draft.writer.write)).publish(0)
        await client.close()

    asyncio.run(others())
    daemon.start()
    wait_for("the version", lambda: daemon.status()["publisher"]["version"] == version, 120)
    assert asyncio.run(chat(daemon.url, LAST[:1]))
    assert daemon.stop() == 0
