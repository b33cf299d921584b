"""A service in memory, the application around it, and a real server on a loopback port."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from fastapi import FastAPI

from adaptd.errors import Overloaded, RequestRefused
from adaptd.server.app import create_app
from adaptd.server.service import Chunk, CompletionInput, Limits, SpeculativeStats, Usage
from checkpoints.errors import CheckpointNotFound

TOKEN = "correct-horse"
WORDS = ("Keep", " the", " wound", " clean", " and", " dry", "; é", "ñ 漢", " done", ".")


@dataclass
class FakeService:
    """Answers every prompt with `words`, one token each; failures and waits are set by the test."""

    words: Sequence[str] = WORDS
    is_ready: tuple[bool, str] = (True, "ready")
    refuse_first: Exception | None = None
    fail_after: tuple[int, Exception] | None = None
    wait_after: int | None = None
    finish: bool = True
    seen: list[CompletionInput] = field(default_factory=list)
    chats: list[tuple[Any, Any]] = field(default_factory=list)
    started: int = 0
    completed: int = 0
    aborted: int = 0
    versions: list[dict[str, Any]] = field(default_factory=lambda: [{"version": 1}, {"version": 2}])
    asked_since: list[str | None] = field(default_factory=list)

    def models(self) -> Sequence[str]:
        return ["adaptd", "pocket/target"]

    def limits(self) -> Limits:
        return Limits(context_length=64, vocabulary_size=1000)

    def encode(self, text: str) -> list[int]:
        return [1 + sum(word.encode()) % 900 for word in text.split()]

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None
    ) -> list[int]:
        self.chats.append((list(messages), tools))
        return [0, *(token for message in messages for token in self.encode(message["content"] or ""))]

    async def generate(self, request: CompletionInput) -> AsyncGenerator[Chunk, None]:
        self.seen.append(request)
        if self.refuse_first is not None:
            raise self.refuse_first
        self.started += 1
        ended = False
        try:
            words = self.words[: request.max_tokens]
            for index, word in enumerate(words):
                if self.fail_after is not None and index == self.fail_after[0]:
                    raise self.fail_after[1]
                if self.wait_after is not None and index == self.wait_after:
                    await asyncio.sleep(60)
                await asyncio.sleep(0)
                if index + 1 < len(words) or not self.finish:
                    yield Chunk(word, 1)
                    continue
                usage = Usage(len(request.prompt_ids), len(words))
                stats = SpeculativeStats(rounds=2, proposed=8, accepted=len(words) - 2, draft_version=3)
                reason = "length" if len(words) < len(self.words) else "stop"
                yield Chunk(word, 1, reason, usage, stats)
            ended = True
        finally:
            if ended:
                self.completed += 1
            else:
                self.aborted += 1

    def ready(self) -> tuple[bool, str]:
        return self.is_ready

    async def status(self, since: str | None) -> Mapping[str, Any]:
        self.asked_since.append(since)
        if since == "yesterday":
            raise RequestRefused("since ('yesterday') must be a number and a unit, such as 1h")
        return {"engine": "native", "draft": {"version": 3}}

    async def report(self, since: str, baseline: str, traces: int) -> Mapping[str, Any]:
        return {"since": since, "baseline": baseline, "traces": traces}

    def metrics(self) -> bytes:
        return b"# TYPE adaptd_requests_total counter\nadaptd_requests_total 7\n"

    async def checkpoints_list(self) -> Sequence[Mapping[str, Any]]:
        return self.versions

    async def promote(self, version: int, force: bool) -> Mapping[str, Any]:
        if version > len(self.versions):
            raise CheckpointNotFound(f"version {version} is not in the store")
        self.versions.append({"version": len(self.versions) + 1, "restored": version})
        return self.versions[-1]

    async def rollback(self) -> Mapping[str, Any]:
        return await self.promote(1, False)


@pytest.fixture
def service() -> FakeService:
    return FakeService()


@pytest.fixture
def overloaded() -> Overloaded:
    return Overloaded("the queue is full (256 requests); retry")


@pytest.fixture
def app(service: FakeService) -> FastAPI:
    return create_app(service, admin_token=TOKEN, max_body_bytes=100_000)


Call = Callable[..., httpx.Response]


@pytest.fixture
def call(app: FastAPI) -> Call:
    """`call("POST", "/v1/completions", json=...)` in process, without a socket."""

    def send(method: str, path: str, client: tuple[str, int] = ("127.0.0.1", 1), **options: Any) -> httpx.Response:
        async def exchange() -> httpx.Response:
            transport = httpx.ASGITransport(app, raise_app_exceptions=False, client=client)
            async with httpx.AsyncClient(transport=transport, base_url="http://adaptd") as http:
                return await http.request(method, path, **options)

        return asyncio.run(exchange())

    return send


@pytest.fixture
def url(app: FastAPI) -> Iterator[str]:
    """Address of a real uvicorn server on a free loopback port."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 10
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.01)
    host, port = server.servers[0].sockets[0].getsockname()[:2]
    yield f"http://{host}:{port}"
    server.should_exit = True
    thread.join(timeout=10)
    assert not thread.is_alive()


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    """OpenAI's own client, without retries so that an error is seen as it is."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=10) as sdk:
        yield sdk


@pytest.fixture
def eventually() -> Callable[[Callable[[], bool]], bool]:
    """Whether a condition comes true within five seconds."""

    def wait(condition: Callable[[], bool]) -> bool:
        deadline = time.monotonic() + 5
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.01)
        return condition()

    return wait
