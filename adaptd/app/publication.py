"""Versions from the store into the server behind the proxy, for as long as the daemon lives.

Whether at all is decided once by the configuration (`why_not`) and, where that leaves it open, by the server each time it
comes up. Nothing here raises into the daemon: what fails is an event and a count, and requests pass meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from adaptd import events
from adaptd.app.publishing import build_publisher
from adaptd.config import Config
from adaptd.errors import ConfigError, PublishFailed, UpstreamUnavailable
from adaptd.log import logger
from adaptd.models.fold import check_publishable
from adaptd.models.scope import ScopeConfig
from adaptd.sidecar.able import why_unable
from adaptd.sidecar.client import VllmClient, is_loopback
from adaptd.sidecar.publish import HasCurrent, PublishFollower
from adaptd.sidecar.publisher import Publisher
from adaptd.sidecar.upstream import Upstream
from buffers.connection import masked

_log = logger(__name__)
#: Before a server that cannot take drafts is asked again; one that came back is asked at once.
_ASK_AGAIN_S = 30.0
_NOT_ASKED = "the server was not asked yet whether it takes drafts"


def why_not(config: Config) -> str:
    """Why this configuration brings no version into the server; empty if it may.

    Raises:
      ConfigError: upstream.publish is true and the scope or the address forbids it; the message names the settings.
    """
    wanted = config.upstream.publish
    if wanted is False:
        return "upstream.publish is false"
    try:
        check_publishable(ScopeConfig(**config.adapt.model_dump(), seed=config.seed))
        if not (config.upstream.publish_remote or is_loopback(config.upstream.url)):
            raise ConfigError(
                f"the server at {masked(config.upstream.url)} can be reached from other machines, and its development routes, "
                "which replace weights, have no key: set upstream.publish_remote: true if only adaptd can reach them"
            )
    except ConfigError as error:
        if wanted:
            raise ConfigError(f"upstream.publish is true, but {error}; or set upstream.publish: false") from None
        return str(error)
    return ""


class Publication:
    """The publisher of one server and its two loops: follow the store, and look after what was brought in.

    Args:
      upstream: whether the server is up.
      prompts: probe prompts, see `adaptd.app.publishing.reserved_prompts`.
      remember: takes an event for the status: its kind, and fields.
      rollback: takes the store back from a version, for a reason.
      part: of the folder of update files that is this server's own, where there are several.
      turn: held while a version is brought in: of several servers one pauses at a time.

    Raises:
      ConfigError: as `why_not`.
    """

    def __init__(
        self,
        config: Config,
        store: HasCurrent,
        upstream: Upstream,
        *,
        prompts: Callable[[], Sequence[Sequence[int]]],
        remember: Callable[..., None],
        rollback: Callable[[int, str], Awaitable[Any]],
        part: str = "",
        turn: asyncio.Lock | None = None,
    ) -> None:
        self._config, self._store, self._upstream = config, store, upstream
        self._remember, self._rollback = remember, rollback
        self._never = why_not(config)
        self._unable = self._never or (_NOT_ASKED if config.upstream.publish is None else "")
        self._client = VllmClient(config.upstream.url, headers=upstream.headers, timeout_s=30.0)
        self._updates = config.home / "updates" / part
        self._turn = turn or asyncio.Lock()
        self._up_since: float | None = None
        self._looked_since: float | None = None
        self._asked_at = 0.0
        self._met = False
        self._restored = 0
        self._last_failure: tuple[int, str] | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self.faults = 0
        """Failures of another kind than the publisher knows."""
        self.publisher: Publisher | None = None
        if not self._never:
            self.publisher = build_publisher(
                config,
                config.upstream.url,
                headers=upstream.headers,
                prompts=prompts,
                folder=self._updates,
                server_folder=None if (seen := config.upstream.server_folder) is None else str(Path(seen) / part),
                allow_remote=config.upstream.publish_remote,
            )
        self.follower = PublishFollower(store, self.publisher, failed=self._failed)

    @property
    def version(self) -> int:
        """What the server drafts with, as far as known."""
        return self.follower.version

    @property
    def active(self) -> bool:
        """Whether versions reach the server at present."""
        return not self._unable

    async def recover(self) -> bool:
        """Resume a server that was left paused; whether it had to.

        Before the first request to the server: a paused one answers none. Raises nothing.
        """
        if self.publisher is None:
            return False
        try:
            resumed = await self.publisher.recover(self._updates)
        except UpstreamUnavailable:
            return False  # down, and its pause with it; looked at again with every poll
        if resumed:
            self._remember("server resumed", reason="a publication that was cut off had left it paused")
            _log.warning(events.UPSTREAM_RESUMED, upstream=self._client.url)
        return resumed

    def start(self) -> None:
        """Begin both loops. Ray must be up."""
        if self.publisher is None:
            return
        for left in self._updates.glob(".tmp-*"):
            left.unlink(missing_ok=True)
        self._tasks = [asyncio.create_task(self._forever(work)) for work in (self._follow, self.publisher.run)]

    async def _forever(self, work: Callable[[], Awaitable[None]]) -> None:
        """Run `work`, and again after a pause if it fails in a way that nobody thought of."""
        while True:
            try:
                await work()
            except Exception as error:  # whatever it is, it must cost drafts, not the daemon
                self.faults += 1
                _log.error(events.PUBLISHER_FAULTED, error=f"{type(error).__name__}: {error}"[:200])
                await asyncio.sleep(_ASK_AGAIN_S)

    async def _follow(self) -> None:
        while True:
            async with self._turn:
                await self.poll()
            await asyncio.sleep(self._config.checkpoints.poll_s)

    async def poll(self) -> None:
        """Publish if the server can take it and CURRENT moved; tell what happened."""
        publisher = self.publisher
        if publisher is None or not self._upstream.up:
            return
        await self.recover()
        if not await self._can():
            return
        if not self._met:
            try:
                # A server that holds what another store published gets this one's version, even day 0.
                self.follower.foreign = await publisher.holds() != 0
            except (PublishFailed, UpstreamUnavailable) as error:
                self._failed(self._store.current() or 0, error)
                return
            self._met = True
        await self._look_at_once()
        if await self.follower.poll():
            self._last_failure = None
            self._remember("published", version=self.version, probe=_said(publisher))
        if publisher.counts["restored"] > self._restored:
            self._restored = publisher.counts["restored"]
            self._remember("restored", version=self.version)

    async def _look_at_once(self) -> None:
        """At a server that came back: the publisher itself looks less and less often at one that is away."""
        if self._looked_since == self._upstream.since or self.publisher is None:
            return
        with contextlib.suppress(PublishFailed, UpstreamUnavailable):  # it goes on looking, and says so
            await self.publisher.look()
            self._looked_since = self._upstream.since

    async def _can(self) -> bool:
        """Whether the server takes drafts: asked when it comes up, and again and again while it does not."""
        if self._config.upstream.publish:  # asked for: a server that cannot says so at the first publication
            return True
        now = asyncio.get_running_loop().time()
        same = self._up_since == self._upstream.since
        if same and (self.active or now < self._asked_at + _ASK_AGAIN_S):
            return self.active
        scope = ScopeConfig(**self._config.adapt.model_dump(), seed=self._config.seed).to_dict()
        try:
            unable = await why_unable(self._client, self._config.engine.k, scope)
        except UpstreamUnavailable:
            return False
        self._up_since, self._asked_at = self._upstream.since, now
        if unable and unable != self._unable:
            _log.warning(events.PUBLISHER_OFF, reason=unable)
        self._unable = unable
        return not unable

    def _failed(self, version: int, error: Exception) -> None:
        """A version did not get in: said once for each reason, counted each time, rolled back if it is the version's fault."""
        if not isinstance(error, PublishFailed | UpstreamUnavailable):
            self.faults += 1
        reason = error.reason if isinstance(error, PublishFailed) else type(error).__name__
        if self._last_failure != (version, reason):
            self._last_failure = (version, reason)
            self._remember("publication failed", version=version, reason=reason, error=str(error)[:300])
        if reason == "acceptance":
            self._tasks = [task for task in self._tasks if not task.done()]
            self._tasks.append(asyncio.create_task(self._give_back(version, str(error))))

    async def _give_back(self, version: int, reason: str) -> None:
        """The store goes back as the server did, so that the learner goes on from what is at work."""
        if self._store.current() != version:
            return
        try:
            await self._rollback(version, f"the server's acceptance: {reason}")
        except Exception as error:  # no learner, or it is restarting: tried again with the next attempt to publish
            self._remember("rollback failed", version=version, error=f"{type(error).__name__}: {error}"[:200])

    def status(self) -> dict[str, Any]:
        """Plain JSON values: whether versions reach the server or why not, and the publisher's own counts."""
        own = {} if self.publisher is None else self.publisher.status()
        return {**own, "active": self.active, "reason": self._unable, "faults": self.faults, **self.follower.counts}

    def swaps(self) -> dict[str, Any]:
        """Counts in the form of a decoder's swaps."""
        pauses = {} if self.publisher is None else self.publisher.counts
        return {
            "swaps": self.follower.counts["swaps"],
            "refusals": self.follower.counts["refusals"],
            "last_pause_s": pauses.get("last_pause_s"),
            "max_pause_s": pauses.get("max_pause_s", 0.0),
            "swapped_at": self.follower.counts["swapped_at"],
        }

    async def close(self) -> None:
        """Let a publication end, or cut it off: it resumes the server as it goes. The server keeps what it has."""
        if self.publisher is not None:
            await self.publisher.settle()
        for task in self._tasks:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.publisher is not None:
            await self.publisher.close()
        await self._client.close()


def _said(publisher: Publisher) -> str | None:
    return None if publisher.last_outcome is None else publisher.last_outcome.reason
