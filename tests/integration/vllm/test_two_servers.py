"""Two real servers behind one proxy: one takes a new draft first, and one that is killed is not noticed."""

import asyncio
import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import torch

from adaptd.pocket.shipped import pocket_prompts
from adaptd.sections import UpstreamConfig
from adaptd.sidecar.fleet import Fleet
from adaptd.sidecar.proxy import Done, Proxy
from adaptd.sidecar.request import plan
from checkpoints.store import CheckpointStore
from tests.integration.vllm.daemon import ServedDaemon, chat, wait_for
from tests.integration.vllm.helpers import Draft, publish_like
from tests.integration.vllm.proxy.test_in_the_way import QUESTIONS, body
from tests.integration.vllm.server import VllmServer

pytestmark = [pytest.mark.vllm, pytest.mark.ray, pytest.mark.redis, pytest.mark.slow]

PROBE_S = 300
#: Requests of the canary after which a version is judged at the latest.
WATCHED = 40
ASKED = pocket_prompts("math")[:48]


class Canary:
    """`adaptd serve` in front of two servers, of which the first takes versions first. Versions come from the test."""

    def __init__(self, first: VllmServer, other: VllmServer, daemon: ServedDaemon, draft: Draft) -> None:
        self.first, self.other, self.daemon = first, other, daemon
        self.store = CheckpointStore(daemon.home / "checkpoints")
        self.manifest, self.good = draft.store.load(1)
        self.plain = asyncio.run(chat(other.url, ASKED, max_tokens=24))

    def publish(self, tensors: dict[str, torch.Tensor]) -> int:
        return publish_like(self.store, self.manifest, tensors)

    def versions(self) -> list[int]:
        return [server["draft_version"] for server in self.daemon.status()["upstream"]["servers"]]

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.daemon.status()["events"] if event["kind"] == kind]

    def ask(self) -> None:
        """Every answer must be the target's, whoever gives it."""
        assert asyncio.run(chat(self.daemon.url, ASKED, max_tokens=24)) == self.plain

    def ask_until(self, kind: str) -> list[str]:
        """Traffic until there is an event of this kind; the labels that the other server had on the way."""
        before, labels = len(self.events(kind)), []
        for _ in range(8):
            self.ask()
            labels.append(self.other.label())
            if len(self.events(kind)) > before:
                return labels
        pytest.fail(f"no {kind!r} in {8 * len(ASKED)} requests: {self.daemon.status()['watch']}")


@pytest.fixture(scope="module")
def canary(
    server: VllmServer, second: VllmServer, draft: Draft, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Canary]:
    settings = {
        "upstream.urls": json.dumps([second.url, server.url]),
        "upstream.capture_share": 0,  # nothing to probe with, nothing to learn from: live acceptance alone decides
        "gate.watch_requests": WATCHED,
        "learn.interval_s": 10**6,
        "drift.delta": 1e-12,
    }
    daemon = ServedDaemon(tmp_path_factory.mktemp("canary"), second.url, settings)
    try:
        daemon.start()
        found = Canary(second, server, daemon, draft)
        wait_for("both", lambda: all(s["publisher"]["active"] for s in daemon.status()["upstream"]["servers"]), 120)
        wait_for("day 0", lambda: server.label() == "default" or server.label().startswith("adaptd-v0-"), 120)
        assert daemon.status()["upstream"]["canary"] == second.url
        for _ in range(2):
            found.ask()  # what versions are compared with
        yield found
        assert daemon.stop() == 0
    finally:
        daemon.end()


def test_a_ruinous_version_goes_back_on_the_canary_and_never_reaches_the_other(canary: Canary) -> None:
    generator = torch.Generator().manual_seed(0)
    ruinous = canary.publish({n: torch.randn(t.shape, generator=generator) for n, t in canary.good.items()})
    wait_for("the canary has it", lambda: canary.versions()[0] == ruinous, 60)
    assert canary.versions()[1] == 0
    labels = canary.ask_until("rollback")
    assert not any(label.startswith(f"adaptd-v{ruinous}-") for label in labels)
    (event,) = canary.events("rollback")
    assert event["refused"] == [ruinous]
    wait_for("both are as before", lambda: set(canary.versions()) <= {0, event["version"]}, 60)
    assert canary.store.load(event["version"])[1].keys() == set(), "day 0"
    assert str(ruinous) in canary.daemon.status()["watch"]["quarantined"]
    assert not canary.other.label().startswith(f"adaptd-v{ruinous}-")


def test_a_good_version_reaches_the_other_once_the_canarys_traffic_has_confirmed_it(canary: Canary) -> None:
    good = canary.publish(canary.good)
    wait_for("the canary has it", lambda: canary.versions()[0] == good, 60)
    assert canary.versions()[1] != good
    before = canary.other.label()
    canary.ask()
    if not canary.events("confirmed"):
        assert canary.other.label() == before, "not before it is confirmed"
        canary.ask_until("confirmed")
    wait_for("the other has it", lambda: canary.versions() == [good, good], 60)
    assert canary.first.label() == canary.other.label()
    assert canary.first.label().startswith(f"adaptd-v{good}-")
    canary.ask()
    assert not canary.events("rollback")[1:]


def test_two_servers_share_the_requests_and_one_that_is_killed_is_not_noticed(
    server: VllmServer, second: VllmServer
) -> None:
    """Last in the file."""
    fleet = Fleet(UpstreamConfig(urls=(second.url, server.url)))
    done: list[Done] = []

    def planner(path: str, data: bytes, labels: Any) -> Any:
        able = fleet.capabilities
        return plan(path, data, top_logprobs=able.top_logprobs, capture=None, models=able.models)

    proxy = Proxy(fleet, planner, done.append)

    async def run() -> None:
        deadline = time.monotonic() + PROBE_S
        while not (await fleet.poll() and all(s.upstream.capabilities.models for s in fleet.servers)):
            assert time.monotonic() < deadline, fleet.error
            await asyncio.sleep(1)
        ables = [each.upstream.capabilities for each in fleet.servers]
        assert [each.odd for each in fleet.servers] == ["", ""]
        assert ables[0].vocabulary == ables[1].vocabulary != ""

        client = httpx.AsyncClient(transport=httpx.ASGITransport(proxy), base_url="http://p", timeout=120)

        async def ask(question: str) -> str:
            answer = await client.post("/v1/chat/completions", json=body(question))
            assert answer.status_code == 200
            return str(answer.json()["choices"][0]["message"]["content"])

        async def direct(question: str) -> str:
            answer = await httpx.AsyncClient(timeout=120).post(f"{server.url}/v1/chat/completions", json=body(question))
            return str(answer.json()["choices"][0]["message"]["content"])

        expected = {question: await direct(question) for question in QUESTIONS}
        await fleet.sample()
        for _ in range(2):
            texts = await asyncio.gather(*map(ask, QUESTIONS))
            assert dict(zip(QUESTIONS, texts, strict=True)) == expected
        assert {d.server for d in done} == {second.url, server.url}
        await fleet.sample()
        load = fleet.load()
        assert load is not None, "rounds are told by the server's own histogram"
        assert 0.0 < load.round_s < 30.0
        assert 1.0 <= load.mal <= 5.0

        asking = asyncio.gather(*map(ask, QUESTIONS * 2))
        await asyncio.sleep(0.3)
        second.kill()
        texts = await asking
        assert dict(zip(QUESTIONS * 2, texts, strict=True)) == expected
        assert proxy.counts.unreachable == proxy.counts.broken == proxy.counts.faults == 0
        await fleet.poll()
        assert [each.ready for each in fleet.servers] == [False, True]
        await ask(QUESTIONS[0])
        assert done[-1].server == server.url
        await client.aclose()
        await fleet.close()

    asyncio.run(run())
