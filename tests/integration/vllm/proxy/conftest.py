"""A real vLLM server with the pocket pair, and the proxy in front of it, both on loopback."""

import asyncio
import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from adaptd.models import load as models
from adaptd.sections import UpstreamConfig
from adaptd.sidecar.headers import Labels
from adaptd.sidecar.proxy import Done, Proxy
from adaptd.sidecar.request import Plan, plan
from adaptd.sidecar.upstream import Upstream, make_client

START_S = 480
PROBE_S = 300
K = 4
HERE = Path(__file__).parents[4]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


class VllmServer:
    """`vllm serve` with the pocket pair; the same small settings as the rest of the tests."""

    def __init__(self, log: Path, *extra: str) -> None:
        root = Path(os.environ.get("ADAPTD_VLLM", HERE / ".vllm"))
        program = root / "bin" / "vllm"
        if not program.is_file():
            pytest.skip(
                f"no vLLM in {root}: run `make .vllm/.installed`, or set ADAPTD_VLLM to its virtual environment"
            )
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        target, draft = (str(models.resolve("pocket", role)) for role in ("target", "draft"))
        speculative = {"method": "draft_model", "model": draft, "num_speculative_tokens": K}
        self.command = [
            str(program),
            *("serve", target, "--host", "127.0.0.1", "--port", str(self.port), "--served-model-name", "pocket"),
            *("--max-model-len", "512", "--enforce-eager", "--dtype", "float32"),
            *("--speculative-config", json.dumps(speculative), "--per-request-spec-decode-metrics", "detailed"),
            *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
            *extra,
        ]
        self.env = {
            **os.environ,
            "PATH": f"{root / 'bin'}:{os.environ['PATH']}",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        self.log = log
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(self.command, env=self.env, stdout=out, stderr=out)
        deadline = time.monotonic() + START_S
        while True:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            try:
                if httpx.get(f"{self.url}/health", timeout=2).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            assert time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.5)

    def stop(self) -> None:
        if self.process is None:
            return
        self.process.terminate()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process = None


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
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    server = VllmServer(tmp_path_factory.mktemp("vllm") / "serve.log")
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def proxied(vllm: VllmServer) -> Iterator[RecordingProxy]:
    proxy = RecordingProxy(vllm.url)
    yield proxy
    proxy.app.stop()
