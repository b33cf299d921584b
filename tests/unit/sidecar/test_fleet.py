"""Several servers behind the proxy: who gets a request, who is left out, who takes a new draft first. ASGI fakes."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest

from adaptd.config import load
from adaptd.errors import ConfigError
from adaptd.sections import UpstreamConfig
from adaptd.sidecar.client import VllmClient
from adaptd.sidecar.fleet import Fleet, Server
from adaptd.sidecar.proxy import Done, Proxy
from adaptd.sidecar.request import plan
from adaptd.sidecar.rollout import Rollout
from tests.integration.fake_upstream import FakeUpstream, question

URLS = ("http://a", "http://b", "http://c")


class Broken(httpx.AsyncByteStream):
    """A body that breaks off after some bytes."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    async def __aiter__(self) -> AsyncIterator[bytes]:
        if self.data:
            yield self.data
        raise httpx.RemoteProtocolError("gone")


class Wire(httpx.AsyncBaseTransport):
    """To an ASGI fake, through faults that a test plants: `fault` gets the request, and may raise or answer."""

    def __init__(self, app: FakeUpstream) -> None:
        self._inner = httpx.ASGITransport(app)
        self.fault: Callable[[httpx.Request], httpx.Response | None] = lambda _: None

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        return self.fault(request) or await self._inner.handle_async_request(request)

    def cut(self, error: Exception, path: str = "/v1/") -> None:
        """Requests of a path fail, those for the health do not."""

        def fault(request: httpx.Request) -> None:
            if request.url.path.startswith(path):
                raise error

        self.fault = fault


class Setting:
    """A fleet of fakes behind a proxy."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *apps: FakeUpstream) -> None:
        self.apps = apps
        self.wires = [Wire(app) for app in apps]
        by_url = dict(zip(URLS, self.wires, strict=False))

        def client(config: UpstreamConfig, **_: Any) -> httpx.AsyncClient:
            return httpx.AsyncClient(base_url=config.url, transport=by_url[config.url])

        for module in ("fleet", "upstream"):
            monkeypatch.setattr(f"adaptd.sidecar.{module}.make_client", client)
        self.fleet = Fleet(UpstreamConfig(urls=URLS[: len(apps)]))
        self.done: list[Done] = []

        def planner(path: str, body: bytes, labels: Any) -> Any:
            able = self.fleet.capabilities
            return plan(path, body, top_logprobs=able.top_logprobs, capture=None, ask_usage=True, models=able.models)

        self.proxy = Proxy(self.fleet, planner, self.done.append)

    async def ask(self, path: str = "/v1/completions", **options: Any) -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(self.proxy), base_url="http://p") as client:
            return await client.post(path, json=question(**options))

    async def raw(self, path: bytes, body: bytes = b"{}") -> tuple[int, bytes, bool]:
        """Status, bytes and whether the answer came to its end, without a client that minds."""
        sent: list[Any] = []
        bodies = [{"type": "http.request", "body": body}]

        async def receive() -> Any:
            if not bodies:
                await asyncio.Event().wait()
            return bodies.pop()

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": path.decode(), "raw_path": path, "query_string": b""}
        await self.proxy({**scope, "headers": [(b"content-type", b"application/json")]}, receive, send)
        ended = not sent[-1].get("more_body", False)
        return sent[0]["status"], b"".join(m.get("body", b"") for m in sent[1:]), ended


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> Setting:
    return Setting(monkeypatch, FakeUpstream(), FakeUpstream())


def test_requests_go_to_the_server_with_the_fewest_in_flight(two: Setting) -> None:
    async def run() -> None:
        assert await two.fleet.poll()
        gate = asyncio.Event()
        for app, wire in zip(two.apps, two.wires, strict=True):
            inner = wire.handle_async_request

            async def slow(request: httpx.Request, inner: Any = inner) -> httpx.Response:
                await gate.wait()
                return await inner(request)  # type: ignore[no-any-return]

            wire.handle_async_request = slow  # type: ignore[method-assign]
            assert app.asked == 0
        asking = [asyncio.create_task(two.ask()) for _ in range(10)]
        await asyncio.sleep(0.05)
        assert [server.in_flight for server in two.fleet.servers] == [5, 5]
        gate.set()
        assert all(answer.status_code == 200 for answer in await asyncio.gather(*asking))
        assert [app.asked for app in two.apps] == [5, 5]
        assert [server.in_flight for server in two.fleet.servers] == [0, 0]
        assert {done.server for done in two.done} == {"http://a", "http://b"}

    asyncio.run(run())


@pytest.mark.parametrize(
    "error", [httpx.ConnectError("no"), httpx.ReadError("reset"), httpx.RemoteProtocolError("closed")]
)
def test_a_server_that_is_gone_before_the_first_byte_costs_the_client_nothing(two: Setting, error: Exception) -> None:
    async def run() -> None:
        await two.fleet.poll()
        two.wires[0].cut(error)
        for stream in (False, True):
            answer = await two.ask(stream=stream)
            assert answer.status_code == 200
            assert b'"choices"' in answer.content
        assert [app.asked for app in two.apps] == [0, 2]
        assert two.proxy.counts.rerouted == 2
        assert two.proxy.counts.unreachable == 0
        assert [done.server for done in two.done] == ["http://b", "http://b"]

    asyncio.run(run())


@pytest.mark.parametrize("kind", ["application/json", "text/event-stream"])
def test_an_answer_that_breaks_off_is_asked_for_again_only_where_the_client_has_seen_nothing(
    two: Setting, kind: str
) -> None:
    async def run() -> None:
        await two.fleet.poll()
        stream = kind == "text/event-stream"
        # Part of an event is held back until it is whole.
        for data in (b"", b'data: {"id"', b'data: {"choices":[{"index":0,"text":"a"}]}\n\n' * 3):
            two.wires[0].fault = lambda request, data=data: httpx.Response(
                200, headers={"content-type": kind}, stream=Broken(data)
            )
            status, content, ended = await two.raw(b"/v1/completions", json.dumps(question(stream=stream)).encode())
            assert status == 200
            # A whole JSON answer is held until its end, so it can always be asked for again.
            seen = stream and data.endswith(b"\n")
            assert ended is not seen
            assert (b"DONE" if stream else b"completion_tokens") in content or seen
        assert two.proxy.counts.broken == (1 if stream else 0)

    asyncio.run(run())


def test_a_request_that_may_still_be_worked_on_is_not_sent_twice(two: Setting) -> None:
    async def run() -> None:
        await two.fleet.poll()
        two.wires[0].cut(httpx.ReadTimeout("slow"))
        assert (await two.ask()).status_code == 504
        two.wires[0].cut(httpx.ReadError("reset"), "/v1/load_lora_adapter")
        assert (await two.ask("/v1/load_lora_adapter")).status_code == 502, "it may have had its effect"
        two.wires[0].cut(httpx.ConnectError("no"), "/v1/embeddings")
        await two.ask("/v1/embeddings")
        assert two.proxy.counts.rerouted == 1

    asyncio.run(run())


def test_with_all_of_them_gone_the_client_gets_an_error_in_one_piece(two: Setting) -> None:
    async def run() -> None:
        await two.fleet.poll()
        for wire in two.wires:
            wire.cut(httpx.ConnectError("no"), "/")
        answer = await two.ask()
        assert answer.status_code == 502
        assert answer.headers["retry-after"]
        assert not await two.fleet.poll()
        assert "http://a" in two.fleet.error
        assert "http://b" in two.fleet.error
        two.wires[1].fault = lambda _: None
        assert await two.fleet.poll()
        assert (await two.ask()).status_code == 200
        assert two.apps[1].asked == 1

    asyncio.run(run())


@pytest.mark.parametrize(
    ("odd", "what"),
    [
        (FakeUpstream(root="other"), "target"),
        (FakeUpstream(k=3), "k (3, not 4)"),
        (FakeUpstream(salt=1), "vocabulary"),
        (FakeUpstream(forced=True), "--enable-force-include-usage"),
    ],
)
def test_the_odd_one_is_left_out_and_it_is_said_why(
    monkeypatch: pytest.MonkeyPatch, odd: FakeUpstream, what: str
) -> None:
    setting = Setting(monkeypatch, odd, FakeUpstream(), FakeUpstream())

    async def run() -> None:
        await setting.fleet.poll()
        assert [server.ready for server in setting.fleet.servers] == [False, True, True], "the majority decides"
        status = setting.fleet.servers[0].status()
        assert status["up"]
        assert what in status["left_out"]
        assert "upstream.urls" in status["left_out"]
        for _ in range(4):
            assert (await setting.ask()).status_code == 200
        assert setting.apps[0].asked == 0
        for wire in setting.wires[1:]:
            wire.cut(httpx.ConnectError("no"), "/")
        await setting.fleet.poll()
        assert setting.fleet.servers[0].ready, "alone it differs from nobody"

    asyncio.run(run())


def test_of_two_that_differ_the_first_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting(monkeypatch, FakeUpstream(k=4), FakeUpstream(k=3))
    asyncio.run(setting.fleet.poll())
    assert [server.ready for server in setting.fleet.servers] == [True, False]
    assert setting.fleet.capabilities.k == 4


def test_what_all_can_do_is_what_the_least_can(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting(monkeypatch, FakeUpstream(), FakeUpstream())
    setting.apps[1].max_logprobs = 5
    asyncio.run(setting.fleet.poll())
    assert setting.fleet.capabilities.top_logprobs == 5


def test_a_trace_has_the_version_of_the_server_that_answered(two: Setting) -> None:
    async def run() -> None:
        await two.fleet.poll()
        for i, server in enumerate(two.fleet.servers):
            server.version = lambda i=i: 7 + i
        two.fleet.servers[0].in_flight = 1
        await two.ask()
        two.fleet.servers[0].in_flight = 0
        await two.ask()
        assert [(done.server, done.draft_version) for done in two.done] == [("http://b", 8), ("http://a", 7)]

    asyncio.run(run())


def test_one_server_takes_a_draft_first_and_the_others_follow_what_is_settled(two: Setting) -> None:
    newest, settled, able = [0], [0], [True, True]
    rollout = Rollout(two.fleet, lambda: newest[0], lambda: settled[0])
    stages = [rollout.stage(server) for server in two.fleet.servers]
    for i, server in enumerate(two.fleet.servers):
        server.takes_drafts = lambda i=i: able[i]

    def wanted() -> list[int | None]:
        return [stage.current() for stage in stages]

    async def run() -> None:
        assert wanted() == [None, None]
        await two.fleet.poll()
        newest[0] = 1
        assert wanted() == [1, None]
        assert rollout.canary == "http://a"
        settled[0] = 1
        assert wanted() == [1, 1]
        newest[0] = settled[0] = 3  # 2 was refused; 3 has the tensors of 1
        assert wanted() == [3, 3]
        two.wires[0].cut(httpx.ConnectError("no"), "/")
        await two.fleet.poll()
        newest[0] = 4
        assert wanted() == [3, 4], "the canary is down: another one tries"
        two.wires[0].fault = lambda _: None
        await two.fleet.poll()
        assert wanted() == [3, 4]
        able[1] = False
        assert wanted() == [4, 3], "it no longer takes any"

    asyncio.run(run())


def test_one_server_alone_takes_what_is_newest(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting(monkeypatch, FakeUpstream())
    rollout = Rollout(setting.fleet, lambda: 4, lambda: 2)
    assert rollout.stage(setting.fleet.servers[0]).current() == 4
    assert rollout.canary is None


def test_servers_are_named_once_and_have_addresses() -> None:
    assert UpstreamConfig(url="http://x").servers[0].url == "http://x"
    found = load(None, ['upstream.urls=["http://a", "unix:///b"]']).upstream.servers
    assert [server.url for server in found] == ["http://a", "unix:///b"]
    for bad in ('["http://a", "http://a"]', '["nowhere"]'):
        with pytest.raises(ConfigError, match=r"upstream"):
            load(None, [f"upstream.urls={bad}"])


def test_dots_and_codes_do_not_hide_a_development_route(two: Setting) -> None:
    async def run() -> None:
        await two.fleet.poll()
        for path in (b"/pause", b"/v1/../pause", b"/%70ause", b"//pause"):
            status, content, _ = await two.raw(path)
            assert status == 403, path
            assert b"development_routes" in content

    asyncio.run(run())


def test_names_of_servers_keep_a_socket_and_no_password() -> None:
    names = [Server(UpstreamConfig(url=url)).name for url in ("unix:///tmp/a.sock", "http://me:secret@a:80")]
    assert names == ["unix:///tmp/a.sock", "http://a:80"]
    assert VllmClient("http://me:secret@a:80/").url == "http://a:80"
