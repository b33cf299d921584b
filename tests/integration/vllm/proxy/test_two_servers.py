"""Two real servers behind one proxy: they agree, share the requests, and one that is killed is not noticed."""

import asyncio
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from adaptd.sections import UpstreamConfig
from adaptd.sidecar.fleet import Fleet
from adaptd.sidecar.proxy import Done, Proxy
from adaptd.sidecar.request import plan
from tests.integration.vllm.proxy.conftest import PROBE_S, VllmServer
from tests.integration.vllm.proxy.test_in_the_way import QUESTIONS, body

pytestmark = pytest.mark.vllm


def test_two_servers_share_the_requests_and_one_that_is_killed_is_not_noticed(vllm: VllmServer, tmp_path: Path) -> None:
    second = VllmServer(tmp_path / "serve.log")
    second.start()
    fleet = Fleet(UpstreamConfig(urls=(second.url, vllm.url)))
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
        ables = [server.upstream.capabilities for server in fleet.servers]
        assert [server.odd for server in fleet.servers] == ["", ""]
        assert ables[0].vocabulary == ables[1].vocabulary != ""

        client = httpx.AsyncClient(transport=httpx.ASGITransport(proxy), base_url="http://p", timeout=120)

        async def ask(question: str) -> str:
            answer = await client.post("/v1/chat/completions", json=body(question))
            assert answer.status_code == 200
            return str(answer.json()["choices"][0]["message"]["content"])

        async def direct(question: str) -> str:
            answer = await httpx.AsyncClient(timeout=120).post(f"{vllm.url}/v1/chat/completions", json=body(question))
            return str(answer.json()["choices"][0]["message"]["content"])

        expected = {question: await direct(question) for question in QUESTIONS}
        await fleet.sample()
        for _ in range(2):
            texts = await asyncio.gather(*map(ask, QUESTIONS))
            assert dict(zip(QUESTIONS, texts, strict=True)) == expected
        assert {d.server for d in done} == {second.url, vllm.url}
        await fleet.sample()
        load = fleet.load()
        assert load is not None, "rounds are told by the server's own histogram"
        assert 0.0 < load.round_s < 30.0
        assert 1.0 <= load.mal <= 5.0

        asking = asyncio.gather(*map(ask, QUESTIONS * 2))
        await asyncio.sleep(0.3)
        assert second.process is not None
        second.process.kill()
        texts = await asking
        assert dict(zip(QUESTIONS * 2, texts, strict=True)) == expected
        assert proxy.counts.unreachable == proxy.counts.broken == proxy.counts.faults == 0
        await fleet.poll()
        assert [server.ready for server in fleet.servers] == [False, True]
        await ask(QUESTIONS[0])
        assert done[-1].server == vllm.url
        await client.aclose()
        await fleet.close()

    try:
        asyncio.run(run())
    finally:
        second.stop()
