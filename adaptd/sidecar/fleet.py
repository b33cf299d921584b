"""The servers behind the proxy: which of them may take a request, and which takes the next one.

Requests go to the one with the fewest in flight among those that are up and agree. To agree is to have the target, the
number of drafted tokens, the vocabulary and the form of streamed usage of most of them (of the first, in a tie): an answer
must not depend on who gives it, and one learner learns from all. The odd one gets no request, and status says why.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, replace
from typing import Any

import httpx

from adaptd import events
from adaptd.log import logger
from adaptd.sections import UpstreamConfig
from adaptd.sidecar.load import Load, LoadMeter
from adaptd.sidecar.probe import Capabilities
from adaptd.sidecar.upstream import Upstream, make_client
from buffers.connection import masked

_log = logger(__name__)


class Server:
    """One of them.

    Args:
      version: of the draft that it serves with now.
    """

    def __init__(self, config: UpstreamConfig, version: Callable[[], int] = lambda: 0) -> None:
        self.config, self.name = config, masked(config.url)
        self.client = make_client(config)
        self.upstream = Upstream(config)
        self.meter = LoadMeter(self.client)
        self.version = version
        self.takes_drafts: Callable[[], bool] = lambda: False
        self.in_flight = 0
        self.odd = ""
        """Why it is left out though it is up; empty if it is not."""

    @property
    def ready(self) -> bool:
        """Whether it may take requests."""
        return self.upstream.up and not self.odd

    def status(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "url": self.name,
            "up": self.upstream.up,
            "error": self.upstream.error,
            "since": self.upstream.since,
            "left_out": self.odd or None,
            "in_flight": self.in_flight,
            "draft_version": self.version(),
            **asdict(self.upstream.capabilities),
        }


class Fleet:
    """Watches all servers; to its owner it looks like one, up while one of them is.

    Args:
      config: section `upstream`; its `servers` are those.
    """

    def __init__(self, config: UpstreamConfig) -> None:
        self._config = config
        self.servers = [Server(each) for each in config.servers]
        self.headers = self.servers[0].upstream.headers

    @property
    def ready(self) -> list[Server]:
        """Those that may take requests."""
        return [server for server in self.servers if server.ready]

    @property
    def up(self) -> bool:
        """Whether a request would be served now."""
        return bool(self.ready)

    @property
    def error(self) -> str:
        """Why not, of each server."""
        if self.up:
            return ""
        return "; ".join(
            f"{server.name}: {server.odd or server.upstream.error}" if self.several else server.upstream.error
            for server in self.servers
        )

    @property
    def since(self) -> float:
        """Unix time of the last change from up to down or back."""
        return max(server.upstream.since for server in self.ready or self.servers)

    @property
    def capabilities(self) -> Capabilities:
        """What all that may take requests can do."""
        found = [s.upstream.capabilities for s in self.ready if s.upstream.capabilities.models]
        if not found:
            # One that is up and could not be probed says why.
            return next((s.upstream.capabilities for s in self.ready), Capabilities())
        return replace(
            found[0],
            models=tuple(name for name in found[0].models if all(name in each.models for each in found)),
            top_logprobs=min(each.top_logprobs for each in found),
            per_step=all(each.per_step for each in found),
            reason=next((each.reason for each in found if each.reason), ""),
        )

    @property
    def several(self) -> bool:
        """Whether there may be another server to ask."""
        return len(self.servers) > 1

    def take(self, tried: Collection[Any] = ()) -> Server | None:
        """The server for the next request, or for one that `tried` had no answer for; None: there is no other.

        One that was not asked yet may be up, and one that is down may have come back: with nobody else, one is tried.
        """
        left = [server for server in self.ready if server not in tried]
        if not left and not tried:
            left = [server for server in self.servers if not server.odd]
        return min(left, key=lambda server: server.in_flight, default=None)

    async def poll(self) -> bool:
        """Look at every server; whether one is up. Raises nothing."""
        await asyncio.gather(*(server.upstream.poll() for server in self.servers))
        self._agree()
        return self.up

    def _agree(self) -> None:
        """Leave out whoever differs from most of those that were probed."""
        probed = [server for server in self.servers if server.upstream.capabilities.models]
        votes = Counter(_kind(server.upstream.capabilities) for server in probed)
        if not votes:
            for server in self.servers:
                server.odd = ""
            return
        # Of equally many the first: a counter keeps the order in which it met them.
        common = votes.most_common(1)[0][0]
        for server in self.servers:
            able = server.upstream.capabilities
            if not server.upstream.up:
                why = ""
            elif not able.models:
                why = able.reason
            else:
                why = _differs(_kind(able), common)
            if why and why != server.odd:
                _log.warning(events.UPSTREAM_LEFT_OUT, upstream=server.name, reason=why)
            server.odd = why

    async def sample(self) -> None:
        """Take a sample of every server's load."""
        await asyncio.gather(*(server.meter.poll() for server in self.servers if server.upstream.up))

    def load(self) -> Load | None:
        """Rounds of all servers together, each weighted by how many it had."""
        found = [load for server in self.servers if (load := server.meter.load()) is not None]
        rounds = sum(load.rounds for load in found)
        if not rounds:
            return None
        return Load(
            round_s=sum(load.round_s * load.rounds for load in found) / rounds,
            mal=sum(load.mal * load.rounds for load in found) / rounds,
            running=sum(load.running * load.rounds for load in found) / rounds,
            rounds=rounds,
        )

    async def wait(self, seconds: float) -> bool:
        """Wait until one is up, at most `seconds`; whether one is."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        while not await self.poll():
            left = deadline - loop.time()
            if left <= 0:
                return False
            await asyncio.sleep(min(self._config.poll_s, left))
        return True

    async def close(self) -> None:
        """Close the connections."""
        for server in self.servers:
            await server.upstream.close()
            await server.client.aclose()


class Alone:
    """One server that nobody watches, in the form of a fleet."""

    several = False

    def __init__(self, client: httpx.AsyncClient, version: Callable[[], int]) -> None:
        self.client, self.version, self.name, self.in_flight = client, version, "", 0

    def take(self, tried: Collection[Any] = ()) -> Alone | None:
        """That one, once."""
        return None if tried else self


_Kind = tuple[str, int | None, str, bool]
_NAMES = ("target", "k", "vocabulary", "--enable-force-include-usage")


def _kind(able: Capabilities) -> _Kind:
    return able.target_id, able.k, able.vocabulary, able.usage_forced


def _differs(own: Sequence[Any], common: Sequence[Any]) -> str:
    """In what a server differs from most of them, in words; a vocabulary that one does not tell is not held against it."""
    found = [
        f"{name} ({mine}, not {theirs})"
        for name, mine, theirs in zip(_NAMES, own, common, strict=True)
        if mine != theirs and not (name == "vocabulary" and "" in (mine, theirs))
    ]
    remedy = "start it as them, or take it out of upstream.urls"
    return f"it differs from the others in {', '.join(found)}: {remedy}" if found else ""
