"""The server behind the proxy: how to reach it, whether it is up, and what it can do at present."""

from __future__ import annotations

import asyncio
import time
from urllib.parse import urlsplit

import httpx

from adaptd import events
from adaptd.log import logger
from adaptd.sections import UpstreamConfig
from adaptd.sidecar.probe import Capabilities, probe

_log = logger(__name__)
#: Below uvicorn's 5 s, after which the server closes an idle connection under a request that is just being sent.
_KEEP_ALIVE_S = 2.0
_PROBE_TIMEOUT_S = 30.0
#: Before a server that is up and could not be probed is probed again.
_REPROBE_S = 30.0
_NOT_ASKED = "not asked yet"


def make_client(config: UpstreamConfig, *, timeout: httpx.Timeout | None = None) -> httpx.AsyncClient:
    """A client whose base_url is the server; it follows no redirect and heeds no proxy of the environment."""
    parts = urlsplit(config.url)
    socket = parts.path if parts.scheme == "unix" else None
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=_KEEP_ALIVE_S)
    return httpx.AsyncClient(
        base_url="http://vllm" if socket else config.url,
        transport=httpx.AsyncHTTPTransport(uds=socket, limits=limits, retries=1, trust_env=False),
        timeout=timeout or httpx.Timeout(None, connect=config.connect_timeout_s, read=config.read_timeout_s),
    )


class Upstream:
    """Watches one server. `capabilities` are those of the server that is up now, or empty."""

    def __init__(self, config: UpstreamConfig) -> None:
        self._config = config
        self._client = make_client(config, timeout=httpx.Timeout(_PROBE_TIMEOUT_S, connect=config.connect_timeout_s))
        key = config.api_key
        self.headers = {"authorization": f"Bearer {key.get_secret_value()}"} if key else {}
        self.up = False
        self.error = _NOT_ASKED
        self.since = time.time()
        self.capabilities = Capabilities()
        self._probed_at: float | None = None

    async def poll(self) -> bool:
        """Ask once; whether it is up. A server that came back is probed again. Raises nothing."""
        try:
            (await self._client.get("/health")).raise_for_status()
        except httpx.HTTPError as error:
            self._lost(f"{type(error).__name__}: {error}"[:200])
            return False
        if not self.up:
            self.up, self.error, self.since = True, "", time.time()
            self._probed_at = None
        if self._probed_at is None or (
            not self.capabilities.models and time.monotonic() > self._probed_at + _REPROBE_S
        ):
            await self._probe()
        return True

    async def _probe(self) -> None:
        """Requests pass whatever comes of it: a server that cannot be probed is only never added to."""
        try:
            found = await probe(self._client, self.headers, self._config.top_logprobs)
        except Exception as error:  # refused, gone again, or answers that are not what was expected
            found = Capabilities(
                reason=f"the server could not be probed ({type(error).__name__}): does it need upstream.api_key?"
            )
        self.capabilities, self._probed_at = found, time.monotonic()
        _log.info(
            events.UPSTREAM_PROBED,
            version=found.version,
            k=found.k,
            top_logprobs=found.top_logprobs,
            per_step=found.per_step,
            reason=found.reason,
        )

    def _lost(self, error: str) -> None:
        if self.up or self.error == _NOT_ASKED:
            self.since = time.time()
            _log.warning(events.UPSTREAM_LOST, error=error)
        self.up, self.error, self.capabilities = False, error, Capabilities()

    async def wait(self, seconds: float) -> bool:
        """Wait until it is up, at most `seconds`; whether it is."""
        deadline = time.monotonic() + seconds
        while not await self.poll():
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            await asyncio.sleep(min(self._config.poll_s, left))
        return True

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()
