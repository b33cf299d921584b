"""The reverse proxy: every request goes to the server, every answer comes back, as soon as there is a byte of it.

Plain ASGI over httpx. Nothing of adaptd's own can stop a request: what goes wrong in planning, restoring or reporting is
counted, and the bytes go on as they are. A client that leaves closes its connection to the server, which makes vLLM abort
the request. A request that was added to and refused (400, 422) is sent again as it came, so that an error is always the
server's answer to what the client sent.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

import httpx
from starlette.types import Message, Receive, Scope, Send

from adaptd import events
from adaptd.log import logger
from adaptd.sidecar.answer import Seen, StreamRestorer, restore
from adaptd.sidecar.asgi import Sender, gone, read_body, refuse
from adaptd.sidecar.fleet import Alone, Fleet, Server
from adaptd.sidecar.headers import Labels, RawHeaders, is_development_route, to_client, to_server
from adaptd.sidecar.request import PATHS, Plan
from adaptd.sidecar.share import CaptureShare, Ticket

_log = logger(__name__)
#: What vLLM refuses a request with before it generates.
_REFUSALS = (400, 422)
#: How long the end of a body may take behind the last event of a stream, once the client has left.
_END_S = 1.0
_ANY_BASE = httpx.URL("http://any")


@dataclass(slots=True)
class Done:
    """One request that the server answered."""

    plan: Plan
    seen: Seen
    labels: Labels
    draft_version: int
    """Of the draft that served when the request began."""
    seconds: float
    server: str = ""
    """Which one answered; empty if there is but one."""


@dataclass(slots=True)
class Counts:
    """Since the proxy started."""

    requests: int = 0
    in_flight: int = 0
    aborted: int = 0
    """Clients that left before their answer was complete."""
    unreachable: int = 0
    """Requests that the server did not answer at all."""
    broken: int = 0
    """Answers that the server broke off."""
    rerouted: int = 0
    """Requests that another server took, because the first broke off before the first byte of an answer."""
    resent: int = 0
    """Requests sent again without our additions because the server refused them."""
    faults: int = 0
    """Failures of our own; the request went on without us."""
    uncaptured: Counter[str] = field(default_factory=Counter)
    """Requests that were not captured, by reason."""


class Proxy:
    """ASGI application in front of one server, or several.

    A request whose server is gone before there is a byte of an answer goes to another one.

    Args:
      servers: chooses a server for each request; a client alone is one server, its base_url the server's root.
      planner: (path, body, labels) to what is sent; None leaves the request alone. May raise.
      report: called in the event loop with every request that was planned and answered; must be quick. May raise.
      draft_version: of the draft that serves now, where `servers` is one client.
      share: is told when planned requests begin and end.
      development_routes: pass vLLM's unguarded routes.
    """

    def __init__(
        self,
        servers: httpx.AsyncClient | Fleet,
        planner: Callable[[str, bytes, Labels], Plan | None],
        report: Callable[[Done], None],
        draft_version: Callable[[], int] = lambda: 0,
        *,
        share: CaptureShare | None = None,
        development_routes: bool = False,
    ) -> None:
        self._servers = Alone(servers, draft_version) if isinstance(servers, httpx.AsyncClient) else servers
        self._share = share
        self._planner, self._report, self._development_routes = planner, report, development_routes
        self.counts = Counts()
        self.closing = False
        """True refuses what still comes, with a retry: the connections to the server are about to close."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection; only HTTP is."""
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1013})
            return
        self.counts.requests += 1
        self.counts.in_flight += 1
        try:
            body = await read_body(receive)
            if body is None:
                self.counts.aborted += 1
                return
            sender = Sender(send)
            await self._until_gone(self._exchange(scope, body, sender), sender, receive)
        finally:
            self.counts.in_flight -= 1

    async def _until_gone(self, work: Any, send: Sender, receive: Receive) -> None:
        """Do `work` unless the client leaves first, with its answer incomplete."""
        working, watching = asyncio.ensure_future(work), asyncio.ensure_future(gone(receive))
        try:
            await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
            if send.answered:
                await asyncio.wait((working,), timeout=_END_S)
            if not working.done():
                self.counts.aborted += 1
                working.cancel()
            await working
        except asyncio.CancelledError:
            if not working.cancelled():
                working.cancel()
                raise
        finally:
            watching.cancel()

    async def _exchange(self, scope: Scope, body: bytes, send: Sender) -> None:
        if self.closing:
            await refuse(send, 503, "adaptd is shutting down; retry", "server_error")
            return
        started = time.monotonic()
        # As a server would see it: dots resolved, whatever is encoded decoded.
        relative = unquote(_url(_ANY_BASE, scope).path)
        if is_development_route(relative) and not self._development_routes:
            await refuse(
                send,
                403,
                f"{relative[:60]} is not passed on, because the server's API key does not guard it; call the server "
                "itself, or set upstream.development_routes",
                "permission_error",
            )
            return
        labels = Labels.of(scope["headers"])
        plan = self._plan(scope, body, labels)
        ticket = self._begun(plan)
        seen: Seen | None = None
        try:
            seen = await self._answered(scope, body, labels, plan, started, send)
        finally:
            self._ended(ticket, seen)

    async def _answered(
        self, scope: Scope, body: bytes, labels: Labels, plan: Plan | None, started: float, send: Sender
    ) -> Seen | None:
        """One request answered by whichever server; what it said, or None if it was not read or not complete."""
        tried: list[Alone | Server] = []
        error: httpx.TransportError | None = None
        while (server := self._servers.take(tried)) is not None:
            tried.append(server)
            version = server.version()
            server.in_flight += 1
            try:
                plan, answer, seen = await self._ask(server, scope, body, plan, send)
            except _NoAnswer as lost:
                error = lost.cause
                _log.warning(events.UPSTREAM_UNREACHABLE, upstream=server.name, error=type(error).__name__)
                if not _again(scope, error):
                    break
                continue
            finally:
                server.in_flight -= 1
            self.counts.rerouted += len(tried) > 1
            if plan is not None and seen is not None and answer.status_code == 200:
                self._tell(Done(plan, seen, labels, version, time.monotonic() - started, server.name))
            return seen
        self.counts.unreachable += 1
        timed_out = isinstance(error, httpx.ReadTimeout)
        message = "gave no answer in time" if timed_out else "is not reachable or broke the connection"
        await refuse(send, 504 if timed_out else 502, f"the server behind adaptd {message}; retry", "server_error")
        return None

    async def _ask(
        self, server: Alone | Server, scope: Scope, body: bytes, plan: Plan | None, send: Sender
    ) -> tuple[Plan | None, httpx.Response, Seen | None]:
        """One exchange with one server.

        Raises:
          _NoAnswer: nothing was sent to the client yet.
        """
        client, method, headers = server.client, scope["method"], scope["headers"]
        url = _url(client.base_url, scope)
        try:
            answer = await _send(client, method, url, headers, plan.body if plan else body, plan)
            if plan is not None and plan.body != body and answer.status_code in _REFUSALS:
                await answer.aclose()
                self.counts.resent += 1
                plan = None
                answer = await _send(client, method, url, headers, body, None)
        except httpx.TransportError as error:
            raise _NoAnswer(error) from error
        try:
            return plan, answer, await self._relay(answer, plan, send, held=self._servers.several)
        finally:
            await answer.aclose()

    def _plan(self, scope: Scope, body: bytes, labels: Labels) -> Plan | None:
        if scope["method"] != "POST":
            return None
        try:
            plan = self._planner(scope["path"], body, labels)
        except Exception as error:  # ours, not the client's: the request goes on as it came
            self._fault("plan", error)
            return None
        if plan is not None and plan.why_not is not None:
            self.counts.uncaptured[plan.why_not] += 1
        return plan

    def _begun(self, plan: Plan | None) -> Ticket | None:
        try:
            return self._share.begin(plan.captured) if self._share is not None and plan is not None else None
        except Exception as error:
            self._fault("share", error)
            return None

    def _ended(self, ticket: Ticket | None, seen: Seen | None) -> None:
        try:
            if self._share is not None and ticket is not None:
                self._share.end(ticket, seen.tokens if seen is not None else 0)
        except Exception as error:
            self._fault("share", error)

    def _tell(self, done: Done) -> None:
        try:
            self._report(done)
        except Exception as error:  # ours, and the client has its answer
            self._fault("report", error)

    def _fault(self, where: str, error: Exception) -> None:
        self.counts.faults += 1
        _log.error(events.PROXY_FAULTED, where=where, error=type(error).__name__)

    async def _relay(self, answer: httpx.Response, plan: Plan | None, send: Sender, *, held: bool) -> Seen | None:
        """Send the answer on; what it said, or None if it was not read or not complete.

        `held`: the head waits for the first byte, so that another server may still be asked.

        Raises:
          _NoAnswer: the server broke off, and nothing was sent to the client yet.
        """
        kind = answer.headers.get("content-type", "")
        read = plan is not None and answer.status_code == 200 and "content-encoding" not in answer.headers
        streamed = read and kind.startswith("text/event-stream")
        whole = read and kind.startswith("application/json")
        head: Message = {
            "type": "http.response.start",
            "status": answer.status_code,
            "headers": to_client(answer.headers.raw, rewritten=streamed or whole),
        }
        seen: Seen | None = None
        begun = False
        try:
            if whole and plan is not None:
                data, seen = self._restored(await answer.aread(), plan)
                head["headers"] = [*head["headers"], (b"content-length", str(len(data)).encode())]
                await send(head)
                await send({"type": "http.response.body", "body": data})
                return seen
            restorer = StreamRestorer(plan) if streamed and plan is not None else None
            if not held:
                await send(head)
                begun = True
            async with aclosing(self._pieces(answer, restorer)) as pieces:
                async for piece in pieces:
                    if not begun:
                        await send(head)
                        begun = True
                    send.answered = restorer is not None and restorer.done
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
            if restorer is not None and restorer.done:
                seen = restorer.seen
        except httpx.TransportError as error:
            if held and not begun:
                raise _NoAnswer(error) from error
            # The headers are out: the only honest end is an incomplete answer, which is also what the server gave.
            self.counts.broken += 1
            _log.warning(events.UPSTREAM_BROKE_OFF, error=type(error).__name__)
            if whole:
                await refuse(send, 502, "the server behind adaptd broke off its answer; retry", "server_error")
            return None
        if not begun:
            await send(head)
        await send({"type": "http.response.body", "body": b""})
        return seen

    def _restored(self, data: bytes, plan: Plan) -> tuple[bytes, Seen]:
        try:
            return restore(data, plan)
        except Exception as error:
            self._fault("restore", error)
            return data, Seen()

    async def _pieces(self, answer: httpx.Response, restorer: StreamRestorer | None) -> AsyncGenerator[bytes, None]:
        async for data in answer.aiter_raw():
            piece = data
            if restorer is not None:
                try:
                    piece = restorer.feed(data)
                except Exception as error:
                    self._fault("restore", error)
            if piece:
                yield piece
        if restorer is not None and (left := restorer.close()):
            yield left


class _NoAnswer(Exception):
    """A server was gone before the client got anything from it."""

    def __init__(self, cause: httpx.TransportError) -> None:
        super().__init__(str(cause))
        self.cause = cause


def _again(scope: Scope, error: httpx.TransportError) -> bool:
    """Whether another server may be asked: where the first was never reached, or only ever generates.

    Not after a time-out: that request is still being worked on.
    """
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        return True
    return not isinstance(error, httpx.TimeoutException) and (scope["method"] != "POST" or scope["path"] in PATHS)


async def _send(
    client: httpx.AsyncClient, method: str, url: httpx.URL, headers: RawHeaders, body: bytes, plan: Plan | None
) -> httpx.Response:
    sent = [
        (b"host", url.netloc),
        *to_server(headers, plain=plan is not None),
        *([(b"content-length", str(len(body)).encode())] if body or method in ("POST", "PUT", "PATCH") else []),
    ]
    # Not build_request: it would add headers of its own.
    request = httpx.Request(method, url, headers=sent, stream=httpx.ByteStream(body))
    request.extensions["timeout"] = client.timeout.as_dict()
    return await client.send(request, stream=True)


def _url(base: httpx.URL, scope: Scope) -> httpx.URL:
    """The same path and query at the server, percent-encoding kept."""
    raw = base.raw_path.rstrip(b"/") + scope.get("raw_path", scope["path"].encode()).partition(b"?")[0]
    return base.copy_with(raw_path=raw + (b"?" + scope["query_string"] if scope["query_string"] else b""))
