"""The proxy as an ASGI application in front of a fake server: what passes, what is said when it cannot, what never stops it."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx
import pytest

from adaptd.sidecar.dispatch import Dispatch
from adaptd.sidecar.headers import Labels
from adaptd.sidecar.proxy import Done, Proxy
from adaptd.sidecar.request import Plan, plan

CHAT = "/v1/chat/completions"
BODY = json.dumps({"model": "m", "messages": [{"role": "user", "content": "hi"}]}).encode()
ANSWER = b'{"id":"c-1","choices":[{"index":0,"logprobs":null,"finish_reason":"stop","token_ids":[5]}],"prompt_token_ids":[1]}'
PLAIN = ANSWER.replace(b"[5]", b"null").replace(b"[1]", b"null")
JSON = [("content-type", "application/json")]
Handler = Callable[[httpx.Request], Awaitable[httpx.Response]]


class Stream(httpx.AsyncByteStream):
    """Bytes one after the other, with a note of whether it was closed."""

    def __init__(self, pieces: AsyncIterator[bytes]) -> None:
        self._pieces = pieces
        self.closed = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for piece in self._pieces:
            yield piece

    async def aclose(self) -> None:
        self.closed = True


class Client:
    """One client of the proxy, by hand."""

    def __init__(self, proxy: Any, method: str = "POST", path: str = CHAT, body: bytes = BODY, **headers: str) -> None:
        raw, _, query = path.partition("?")
        self.scope = {
            "type": "http",
            "method": method,
            "path": raw,
            "raw_path": raw.encode(),
            "query_string": query.encode(),
            "headers": [(n.replace("_", "-").encode(), v.encode()) for n, v in headers.items()],
        }
        self.proxy, self.body = proxy, body
        self.sent: list[dict[str, Any]] = []
        self.leave = asyncio.Event()
        self._given = False

    async def receive(self) -> dict[str, Any]:
        if not self._given:
            self._given = True
            return {"type": "http.request", "body": self.body, "more_body": False}
        await self.leave.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)

    async def run(self) -> "Client":
        await self.proxy(self.scope, self.receive, self.send)
        return self

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    @property
    def headers(self) -> dict[str, str]:
        return {n.decode(): v.decode() for n, v in self.sent[0]["headers"]}

    @property
    def answer(self) -> bytes:
        return b"".join(m.get("body", b"") for m in self.sent[1:])

    @property
    def complete(self) -> bool:
        return not self.sent[-1].get("more_body", False) and self.sent[-1]["type"] == "http.response.body"


async def _once(data: bytes) -> AsyncIterator[bytes]:
    yield data


def planner(path: str, body: bytes, labels: Labels) -> Plan | None:
    return plan(path, body, top_logprobs=3, capture=None if labels.store else "opted out")


def make(handler: Handler, url: str = "http://server:8000", **options: Any) -> tuple[Proxy, list[Done]]:
    done: list[Done] = []

    async def streamed(request: httpx.Request) -> httpx.Response:
        answer = await handler(request)
        if not isinstance(answer.stream, Stream):  # as from the network: not read yet
            answer = httpx.Response(answer.status_code, headers=answer.headers, stream=Stream(_once(answer.content)))
        return answer

    client = httpx.AsyncClient(base_url=url, transport=httpx.MockTransport(streamed))
    return Proxy(client, options.pop("planner", planner), options.pop("report", done.append), **options), done


async def answered(_: httpx.Request) -> httpx.Response:
    return httpx.Response(200, headers=JSON, content=ANSWER)


def test_an_answer_is_restored_and_reported() -> None:
    seen: list[httpx.Request] = []

    async def handler(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return await answered(request)

    proxy, done = make(handler)
    client = asyncio.run(Client(proxy, x_adaptd_domain="math", authorization="Bearer s", host="proxy").run())
    assert (client.status, client.answer) == (200, PLAIN)
    assert client.headers["content-length"] == str(len(PLAIN))
    assert json.loads(seen[0].content)["return_token_ids"] is True
    assert seen[0].headers["authorization"] == "Bearer s"
    assert seen[0].headers["host"] == "server:8000"
    assert seen[0].headers["accept-encoding"] == "identity"
    assert "x-adaptd-domain" not in seen[0].headers
    assert "user-agent" not in seen[0].headers, "nothing is added"
    assert done[0].labels.domain == "math"
    assert done[0].seen.choices[0].token_ids == [5]


def test_other_paths_pass_with_query_and_encoding() -> None:
    seen: list[httpx.Request] = []

    async def handler(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(404, headers=[("x-a", "1"), ("x-a", "2"), ("connection", "close, x-b"), ("x-b", "3")])

    proxy, done = make(handler, "http://server/root/")
    client = asyncio.run(Client(proxy, "GET", "/v1/models/a%2Fb?x=%20y", b"").run())
    assert str(seen[0].url) == "http://server/root/v1/models/a%2Fb?x=%20y"
    assert "content-length" not in seen[0].headers
    assert client.status == 404
    assert [v for n, v in client.sent[0]["headers"] if n == b"x-a"] == [b"1", b"2"]
    assert "x-b" not in client.headers
    assert not done


@pytest.mark.parametrize("status", [401, 429, 500, 503])
def test_refusals_pass_with_their_headers(status: int) -> None:
    async def handler(_: httpx.Request) -> httpx.Response:
        return httpx.Response(status, headers=[*JSON, ("retry-after", "7")], content=b'{"error":{}}')

    proxy, done = make(handler)
    client = asyncio.run(Client(proxy).run())
    assert (client.status, client.answer) == (status, b'{"error":{}}')
    assert client.headers["retry-after"] == "7"
    assert not done


def test_a_request_refused_with_additions_is_sent_again_without() -> None:
    bodies: list[bytes] = []

    async def handler(request: httpx.Request) -> httpx.Response:
        bodies.append(request.content)
        return httpx.Response(400, headers=JSON, content=b'{"error":{"message":"m"}}')

    proxy, _ = make(handler)
    client = asyncio.run(Client(proxy).run())
    assert len(bodies) == 2
    assert bodies[1] == BODY
    assert client.status == 400
    assert proxy.counts.resent == 1


def test_a_stream_leaves_piece_by_piece() -> None:
    async def scenario() -> None:
        gate = asyncio.Event()

        async def pieces() -> AsyncIterator[bytes]:
            yield b'data: {"choices":[{"index":0,"token_ids":[5],"finish_reason":null}]}\n\n'
            await gate.wait()
            yield b"data: [DONE]\n\n"

        async def handler(_: httpx.Request) -> httpx.Response:
            return httpx.Response(200, headers=[("content-type", "text/event-stream")], stream=Stream(pieces()))

        proxy, _ = make(handler)
        client = Client(proxy, body=BODY[:-1] + b',"stream":true}')
        running = asyncio.create_task(client.run())
        while len(client.sent) < 2:
            await asyncio.sleep(0.001)
        assert b'"token_ids":null' in client.answer
        assert proxy.counts.in_flight == 1
        gate.set()
        await running
        assert client.complete

    asyncio.run(scenario())


@pytest.mark.parametrize("started", [True, False])
def test_a_client_that_leaves_closes_the_connection_to_the_server(started: bool) -> None:
    async def scenario() -> None:
        cancelled = asyncio.Event()

        async def pieces() -> AsyncIterator[bytes]:
            yield b": hello\n\n"
            await asyncio.sleep(60)

        stream = Stream(pieces())

        async def handler(_: httpx.Request) -> httpx.Response:
            if not started:
                try:
                    await asyncio.sleep(60)
                except asyncio.CancelledError:
                    cancelled.set()
                    raise
            return httpx.Response(200, headers=[("content-type", "text/event-stream")], stream=stream)

        proxy, done = make(handler)
        client = Client(proxy)
        running = asyncio.create_task(client.run())
        await asyncio.sleep(0.05)
        client.leave.set()
        await asyncio.wait_for(running, 2)
        assert stream.closed if started else cancelled.is_set()
        assert proxy.counts.aborted == 1
        assert proxy.counts.in_flight == 0
        assert not done

    asyncio.run(scenario())


def test_a_client_that_leaves_at_the_last_event_has_its_answer() -> None:
    """The official client closes at `[DONE]`, before the body has ended."""

    async def scenario() -> None:
        gate = asyncio.Event()

        async def pieces() -> AsyncIterator[bytes]:
            yield b'data: {"id":"c-1","choices":[{"index":0,"delta":{"content":"a"},"finish_reason":"stop","token_ids":[5]}]}\n\n'
            yield b"data: [DONE]\n\n"
            await gate.wait()

        stream = Stream(pieces())

        async def handler(_: httpx.Request) -> httpx.Response:
            return httpx.Response(200, headers=[("content-type", "text/event-stream")], stream=stream)

        proxy, done = make(handler)
        client = Client(proxy, body=BODY[:-1] + b',"stream":true}')
        running = asyncio.create_task(client.run())
        while b"[DONE]" not in client.answer:
            await asyncio.sleep(0.01)
        client.leave.set()
        await asyncio.sleep(0.05)
        gate.set()
        await asyncio.wait_for(running, 2)
        assert proxy.counts.aborted == 0
        assert [d.seen.choices[0].token_ids for d in done] == [[5]]
        assert stream.closed

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("error", "status"), [(httpx.ConnectError, 502), (httpx.RemoteProtocolError, 502), (httpx.ReadTimeout, 504)]
)
def test_a_server_that_does_not_answer_is_said_so(error: type[httpx.TransportError], status: int) -> None:
    async def handler(_: httpx.Request) -> httpx.Response:
        raise error("no")

    proxy, _ = make(handler)
    client = asyncio.run(Client(proxy).run())
    assert client.status == status
    assert client.headers["retry-after"] == "1"
    assert json.loads(client.answer)["error"]["type"] == "server_error"
    assert proxy.counts.unreachable == 1


def test_an_answer_broken_off_is_not_made_to_look_complete() -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield b": hello\n\n"
        raise httpx.ReadError("gone")

    async def handler(_: httpx.Request) -> httpx.Response:
        return httpx.Response(200, headers=[("content-type", "text/event-stream")], stream=Stream(pieces()))

    proxy, done = make(handler)
    client = asyncio.run(Client(proxy).run())
    assert client.answer == b": hello\n\n"
    assert not client.complete
    assert proxy.counts.broken == 1
    assert not done


def fails(*_: Any) -> Any:
    raise RuntimeError("ours")


@pytest.mark.parametrize("options", [{"planner": fails}, {"report": fails}])
def test_a_fault_of_ours_is_counted_and_the_answer_arrives(options: dict[str, Any]) -> None:
    proxy, _ = make(answered, **options)
    client = asyncio.run(Client(proxy).run())
    assert client.status == 200
    assert client.answer in (PLAIN, ANSWER)
    assert proxy.counts.faults == 1


def test_a_restorer_that_fails_lets_the_bytes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adaptd.sidecar.proxy.restore", fails)
    monkeypatch.setattr("adaptd.sidecar.proxy.StreamRestorer.feed", fails)

    async def pieces() -> AsyncIterator[bytes]:
        yield b"data: x\n\n"

    async def streamed(_: httpx.Request) -> httpx.Response:
        return httpx.Response(200, headers=[("content-type", "text/event-stream")], stream=Stream(pieces()))

    for handler, expected in ((answered, ANSWER), (streamed, b"data: x\n\n")):
        proxy, _ = make(handler)
        assert asyncio.run(Client(proxy).run()).answer == expected
        assert proxy.counts.faults == 1


class Share:
    """In the place of `CaptureShare`: what it is told."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def begin(self, captured: bool) -> str:
        self.told.append(captured)
        return "ticket"

    def end(self, ticket: str, tokens: int) -> None:
        self.told.append((ticket, tokens))


@pytest.mark.parametrize("what", ["answered", "lost", "opted out"])
def test_the_share_is_told_when_requests_begin_and_end(what: str) -> None:
    async def handler(request: httpx.Request) -> httpx.Response:
        if what == "lost":
            raise httpx.ReadError("gone")
        content = ANSWER[:-1] + b',"usage":{"completion_tokens":9}}'
        return httpx.Response(200, headers=JSON, content=content)

    share = Share()
    proxy, _ = make(handler, share=share)
    asyncio.run(Client(proxy, **({"x_adaptd_no_store": "1"} if what == "opted out" else {})).run())
    asyncio.run(Client(proxy, "GET", "/v1/models", b"").run())
    assert share.told == [what != "opted out", ("ticket", 0 if what == "lost" else 9)]
    assert not proxy.counts.faults


def test_a_share_that_fails_costs_no_request() -> None:
    share = Share()
    share.begin = fails  # type: ignore[method-assign]
    proxy, done = make(answered, share=share)
    assert asyncio.run(Client(proxy).run()).answer == PLAIN
    assert done
    assert proxy.counts.faults == 1


@pytest.mark.parametrize("path", ["/pause", "//pause", "/x/../collective_rpc", "/%73leep", "/update_weights?x=1"])
def test_development_routes_are_refused_unless_allowed(path: str) -> None:
    proxy, _ = make(answered)
    refused = asyncio.run(Client(proxy, path=path).run())
    assert refused.status == 403
    assert "upstream.development_routes" in refused.answer.decode()
    open_, _ = make(answered, development_routes=True)
    assert asyncio.run(Client(open_, path=path).run()).status == 200


def test_what_comes_while_shutting_down_is_told_to_come_again() -> None:
    proxy, _ = make(answered)
    proxy.closing = True
    client = asyncio.run(Client(proxy).run())
    assert (client.status, client.headers["retry-after"]) == (503, "1")


def test_labels_outside_their_rule_are_dropped_not_refused() -> None:
    def of(**given: str) -> Labels:
        return Labels.of(
            [(f"x-adaptd-{name.replace('_', '-')}".encode(), v.encode("latin-1")) for name, v in given.items()]
        )

    assert of(domain="math", tenant="a.b") == Labels("math", "a.b", True)
    assert of(domain="a b", tenant="é") == Labels()
    assert [of(no_store=v).store for v in ("1", "true", "0", "false", "yes")] == [False, False, True, True, False]


def test_adaptds_own_routes_are_its_own() -> None:
    async def app(name: str, scope: Any, receive: Any, send: Any) -> None:
        taken.append((name, scope["path"]))

    taken: list[tuple[str, str]] = []
    from functools import partial

    dispatch = Dispatch(partial(app, "own"), partial(app, "proxy"))
    paths = ["/", "/readyz", "/metrics", "/adaptd/status", "/v1/models", "/health", "/adaptdx", "/docs"]
    for path in paths:
        asyncio.run(dispatch({"type": "http", "path": path}, None, None))  # type: ignore[arg-type]
    assert [name for name, _ in taken] == ["own"] * 4 + ["proxy"] * 4
