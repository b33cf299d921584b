"""The HTTP routes of one vLLM server that a swap and its checks need. No decisions here, and no retries.

All routes but the OpenAI ones exist only with `VLLM_SERVER_DEV_MODE=1`, and the server's API key does not cover them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

import httpx

from adaptd.errors import UpstreamUnavailable
from adaptd.sidecar.metrics import ServerMetrics, parse_metrics
from buffers.connection import masked

#: A connection a request. vLLM closes a connection after an answer of 500 without saying so, as well as one that was
#: idle for 5 s: the next request on it would fail, and that may be the one which resumes the server.
_NO_KEEP_ALIVE = httpx.Limits(max_keepalive_connections=0)


class UpstreamRefused(Exception):
    """The server answered with an error; `status` is its HTTP status, the text is the server's own."""

    def __init__(self, route: str, status: int, text: str) -> None:
        super().__init__(f"{route} answered {status}: {text}")
        self.status = status
        self.text = text


class VllmClient:
    """One server. Every method raises `UpstreamUnavailable` (no answer) or `UpstreamRefused` (an error answer).

    Args:
      url: root of the server, such as http://127.0.0.1:8000, or unix:///path/to/socket.
      headers: sent with every request, such as an Authorization of the server's API key.
      timeout_s: of a whole answer; hashing a large target's weights takes long.
      transport: of httpx, for tests.
    """

    def __init__(
        self,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = 300.0,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        address = url.rstrip("/")
        #: For logs and messages: without user and password.
        self.url = masked(address)
        parts = urlsplit(address)
        socket = parts.path if parts.scheme == "unix" else None
        self._http = httpx.AsyncClient(
            base_url="http://vllm" if socket else address,
            headers=dict(headers or {}),
            timeout=httpx.Timeout(timeout_s, connect=5.0),
            # No proxy of the environment stands between a sidecar and its server.
            transport=transport or httpx.AsyncHTTPTransport(uds=socket, trust_env=False, limits=_NO_KEEP_ALIVE),
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def weight_version(self) -> str:
        """The label that the last `finish` left; `default` after a start."""
        return str(await self._field("weight_version", "GET", "/weight_info"))

    async def sleeping(self) -> bool:
        """Whether the engine sleeps; servers without sleep mode never do."""
        try:
            return bool(await self._field("is_sleeping", "GET", "/is_sleeping"))
        except UpstreamRefused:
            return False

    async def paused(self) -> bool:
        """Whether generation is paused."""
        return bool(await self._field("is_paused", "GET", "/is_paused"))

    async def pause(self) -> None:
        """Freeze all requests where they are; they go on at `resume`. (The route's default would abort them.)"""
        await self._json("POST", "/pause", params={"mode": "keep"})

    async def resume(self) -> None:
        """Go on; no effect on a server that is not paused."""
        await self._json("POST", "/resume")

    async def init_transfer(self, folder: str) -> None:
        """Set the transfer up: updates will come from `folder`, as the server sees it."""
        await self._json("POST", "/init_weight_transfer_engine", {"init_info": {"folder": folder}})

    async def start_draft_update(self) -> None:
        """Open a session on the draft."""
        await self._json("POST", "/start_draft_weight_update")

    async def update(self, path: str, sha256: str) -> None:
        """Load an update file into the open session."""
        await self._json("POST", "/update_weights", {"update_info": {"path": path, "sha256": sha256}})

    async def finish_update(self, weight_version: str | None = None) -> None:
        """Close the session and label the weights."""
        await self._json("POST", "/finish_weight_update", {"weight_version": weight_version})

    async def target_checksums(self) -> dict[str, str]:
        """sha256 of each of the target's tensors, by rank and name."""
        return dict(await self._field("checksums", "POST", "/weight_checker", {"action": "checksum"}))

    async def config(self) -> dict[str, Any]:
        """The server's resolved configuration."""
        return dict(await self._field("vllm_config", "GET", "/server_info", params={"config_format": "json"}))

    async def models(self) -> list[dict[str, Any]]:
        """The entries of `/v1/models`."""
        return list(await self._field("data", "GET", "/v1/models"))

    async def metrics(self) -> ServerMetrics:
        """The counters of speculation and the start time."""
        return parse_metrics((await self._request("GET", "/metrics")).text)

    async def complete(self, model: str, prompt: Sequence[int], **options: Any) -> dict[str, Any]:
        """A completion of token ids."""
        return await self._json("POST", "/v1/completions", {"model": model, "prompt": list(prompt), **options})

    async def tokenize(self, model: str, **what: Any) -> list[int]:
        """Token ids of a `prompt`, or of `messages` through the server's chat template."""
        body = {"model": model, **what}
        if "messages" in what:
            body["add_generation_prompt"] = True
        return [int(token) for token in await self._field("tokens", "POST", "/tokenize", body)]

    async def _field(self, key: str, method: str, route: str, *args: Any, **kwargs: Any) -> Any:
        found = await self._json(method, route, *args, **kwargs)
        if key not in found:
            raise UpstreamRefused(route, 200, f"the answer has no {key!r}: is this a vLLM server?")
        return found[key]

    async def _json(
        self, method: str, route: str, body: dict[str, Any] | None = None, params: dict[str, str] | None = None
    ) -> dict[str, Any]:
        answer = await self._request(method, route, body, params)
        try:
            found = answer.json()
        except ValueError as error:
            raise UpstreamRefused(route, answer.status_code, "the answer is not JSON") from error
        return found if isinstance(found, dict) else {"value": found}

    async def _request(
        self, method: str, route: str, body: dict[str, Any] | None = None, params: dict[str, str] | None = None
    ) -> httpx.Response:
        try:
            answer = await self._http.request(method, route, json=body, params=params)
        except httpx.HTTPError as error:
            raise UpstreamUnavailable(
                f"the server at {self.url} does not answer {route} ({type(error).__name__}): is it running?"
            ) from error
        if answer.status_code >= 400:
            raise UpstreamRefused(route, answer.status_code, _text(answer))
        return answer


def is_loopback(url: str) -> bool:
    """Whether a server at this address can be reached from this machine only."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    if parts.scheme == "unix" or host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _text(answer: httpx.Response) -> str:
    """What an error answer says, in one short line."""
    try:
        found = answer.json()
    except ValueError:
        found = answer.text
    if isinstance(found, dict):
        inner = found.get("error", found.get("detail", found))
        found = inner.get("message", inner) if isinstance(inner, dict) else inner
    return " ".join(str(found).split())[:600]
