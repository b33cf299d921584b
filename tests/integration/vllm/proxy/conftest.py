"""The proxy in front of a real vLLM server with the pocket pair, both on loopback."""

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn

from adaptd.sections import UpstreamConfig
from adaptd.sidecar.headers import Labels
from adaptd.sidecar.proxy import Done, Proxy
from adaptd.sidecar.request import Plan, plan
from adaptd.sidecar.upstream import Upstream, make_client
from tests.integration.vllm.server import VllmServer

PROBE_S = 300


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


class ServedApp:
    """An ASGI application behind uvicorn in a thread."""

    def __init__(self, app: Any) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        config = uvicorn.Config(
            app,
            host="127.0.0.1",
            port=self.port,
            log_config=None,
            lifespan="off",
            server_header=False,
            date_header=False,
        )
        self._server = uvicorn.Server(config)
        self._server.capture_signals = lambda: __import__("contextlib").nullcontext()  # type: ignore[method-assign]
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.02)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(timeout=10)


class RecordingProxy:
    """The proxy with everything captured, and what it reported."""

    def __init__(self, url: str, top_logprobs: int = 8) -> None:
        config = UpstreamConfig(url=url, top_logprobs=top_logprobs)

        async def probed() -> Upstream:
            upstream = Upstream(config)
            deadline = time.monotonic() + PROBE_S
            while not (
                await upstream.wait(PROBE_S) and upstream.capabilities.models
            ):  # a busy machine is slow to answer
                assert time.monotonic() < deadline, upstream.error or upstream.capabilities.reason
                await asyncio.sleep(1)
            await upstream.close()
            return upstream

        self.upstream = asyncio.run(probed())
        self.done: list[Done] = []
        self.capture = True
        able = self.upstream.capabilities

        def planner(path: str, body: bytes, labels: Labels) -> Plan | None:
            why_not = None if self.capture and labels.store else "opted out"
            return plan(path, body, top_logprobs=able.top_logprobs, capture=why_not, models=able.models)

        self.proxy = Proxy(make_client(config), planner, self.done.append)
        self.app = ServedApp(self.proxy)
        self.url = self.app.url


@pytest.fixture(scope="session")
def vllm(server: VllmServer) -> VllmServer:
    """The server with the draft that it was started with."""
    server.to_day_zero()
    return server


@pytest.fixture(scope="session")
def proxied(vllm: VllmServer) -> Iterator[RecordingProxy]:
    proxy = RecordingProxy(vllm.url)
    yield proxy
    proxy.app.stop()
