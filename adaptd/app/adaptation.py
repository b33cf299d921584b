"""What every daemon does beside serving: folder, buffer, store, learner's ticks, drift, the watch over a promotion.

A daemon is this and somebody who decodes: `adaptd.app.daemon` with decoder actors of its own, `adaptd.app.sidecar` with a
vLLM server behind the proxy.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from apscheduler.schedulers.asyncio import AsyncIOScheduler
from ray.exceptions import RayError, RayTaskError

import buffers.embedded
from adaptd import __version__, events
from adaptd.app import reporting
from adaptd.app.cluster import Cluster
from adaptd.app.state import StateDir
from adaptd.app.trending import Trending
from adaptd.app.watching import Watching
from adaptd.config import Config
from adaptd.errors import RequestRefused
from adaptd.learning.quarantine import refusals
from adaptd.log import logger
from adaptd.report.monitor import Finished, Monitor
from adaptd.report.split import Baseline
from buffers.errors import TableUnavailable
from buffers.open import open_series, open_table
from checkpoints.store import CheckpointStore

_log = logger(__name__)
#: Seconds between two looks at the actors for /metrics, which must answer without asking them.
_SNAPSHOT_S = 5.0
#: Seconds that a status waits for the learner.
_LEARNER_ANSWERS_S = 2.0


class Adaptation:
    """One deployment but for its decoders: learner, buffer, store, monitor."""

    def __init__(self, config: Config, *, log_to_driver: bool = True) -> None:
        self.config = config
        self.monitor = Monitor(config.engine.k, config.drift.delta)
        self.store = CheckpointStore(config.home / "checkpoints")
        self.learner: Any = None
        self.draining = False
        self.serving = False
        self.snapshot: dict[str, Any] | None = None
        self.started_at = time.time()
        self.events: list[dict[str, Any]] = []
        self.buffer_url = config.buffer.url
        self._log_to_driver = log_to_driver
        self._learner_seen: dict[str, Any] | None = None
        self._drifted = False
        self._last_tick = time.monotonic()
        self.watching = Watching(
            config.gate,
            self.store,
            config.home / "watch.json",
            windows=lambda: self.monitor.windows(),
            remember=self._remember,
            went_back=self._learner_follows,
        )
        self.trending = Trending(config)
        self._closing: list[Any] = []

    async def _open(self) -> None:
        """The folder, the buffer and the table; raises StateDirError if the folder cannot be used."""
        self._state = StateDir(self.config.home)
        self._closing.append(self._state.close)
        self.store.recover()
        self.watching.resume()
        if self.config.buffer.url == "embedded":
            self._redis = await asyncio.to_thread(buffers.embedded.start_embedded, self.config.home / "redis")
            self.buffer_url = self._redis.url
            self._closing.append(lambda: self._redis.close())
        self.table = open_table(
            self.buffer_url, self.config.deployment, **self.config.buffer.model_dump(exclude={"url"})
        )
        domains = self.config.trends.domains
        self.trending.connect(open_series(self.buffer_url, self.config.deployment, domains=domains), self.table)

    async def _join_cluster(self, after_cluster: Callable[[], None] | None) -> None:
        """Ray and the learner actor; `after_cluster` is called in the event loop's thread once Ray is up."""
        self._cluster = await asyncio.to_thread(Cluster, self.config, log_to_driver=self._log_to_driver)
        self._closing.append(self._cluster.close)
        if after_cluster is not None:
            after_cluster()
        self.learner = self._cluster.learner(self.buffer_url) if self.config.learn.enabled else None

    def _start_scheduler(self) -> None:
        """What is done again and again beside the learner's ticks."""
        # A tick that is due while one runs is skipped by design; the scheduler would warn of each.
        logging.getLogger("apscheduler").setLevel(logging.ERROR)
        self._scheduler = AsyncIOScheduler()
        self._scheduler.start()
        self._every(_SNAPSHOT_S, self.status)
        self._every(self.config.trends.every_s, self.trending.write)
        if self.config.buffer.url == "embedded":
            self._every(_SNAPSHOT_S, self._keep_redis)

    def _start_ticking(self) -> None:
        """Ask the learner, again and again, whether there is something to learn."""
        if self.learner is not None:
            # A tick is skipped, not queued, while one runs: the job awaits it, and one instance at a time is allowed.
            self._every(self.config.learn.poll_s, self._tick, misfire_grace_time=None)

    async def _learner_status(self) -> dict[str, Any] | None:
        """The learner's counters; the last known ones while it is loaded or restarted; None before, and without one."""
        if self.learner is not None:
            with contextlib.suppress(RayError, TimeoutError):
                self._learner_seen = await asyncio.wait_for(self.learner.status.remote(), _LEARNER_ANSWERS_S)
        return self._learner_seen

    def _every(self, seconds: float, job: Callable[[], Awaitable[Any]], **options: Any) -> None:
        async def run() -> None:
            try:
                await job()
            except asyncio.CancelledError:  # shutting down; the scheduler would print a traceback of it
                if not self.draining:
                    raise

        self._scheduler.add_job(run, "interval", seconds=seconds, max_instances=1, coalesce=True, **options)

    async def status(self) -> dict[str, Any]:
        """Everything `adaptd status` shows, as JSON values; each daemon adds who decodes."""
        raise NotImplementedError

    def ready(self) -> tuple[bool, str]:
        """Whether a request would be served now, and the state in a word."""
        raise NotImplementedError

    async def _common_status(self) -> dict[str, Any]:
        """What is the same for every daemon."""
        buffer = await self.buffer_status()
        version = self.store.current() or 0
        return {
            "adaptd_version": __version__,
            "deployment": self.config.deployment,
            "engine": self.config.engine.kind,
            "k": self.config.engine.k,
            "uptime_s": time.time() - self.started_at,
            "draining": self.draining,
            "draft": {
                "version": version,
                "age_s": time.time() - self.store.manifest(version).created_at if version else None,
                "scope": self.config.adapt.scope,
            },
            "acceptance": self.monitor.status(),
            "buffer": buffer,
            "learner": await self._learner_status(),
            "watch": self.watching.status(),
            "series": self.trending.status(),
            "events": self.events[-32:],
        }

    async def _keep_redis(self) -> None:
        """Start the embedded server again if it died; its last snapshot is in its folder."""
        if self.draining or self._redis.alive():
            return
        _log.error(events.BUFFER_UNAVAILABLE, error="the embedded Redis ended; starting it again")
        await asyncio.to_thread(self._redis.close)
        self._redis = await asyncio.to_thread(buffers.embedded.start_embedded, self.config.home / "redis")

    async def _tick(self) -> None:
        drifted, self._drifted = self._drifted, False
        try:
            self.watching.catch_up(self.config.engine.k)
            since = time.monotonic() - self._last_tick
            report = await self._the_learner().tick.remote(drifted, since, self.watching.before)
        except RayError as error:
            _log.error(events.LEARNER_LOST, error=type(error).__name__)
            return
        except asyncio.CancelledError:  # shutting down: the tick is left to end with its actor
            return
        if report is None:
            self._drifted = self._drifted or drifted
            return
        self._last_tick = time.monotonic()
        verdict = report["verdict"]
        if report["published"]:
            self._remember("promoted", version=report["published"], gain=verdict["gain"])
            self.watching.promoted(report["published"], self.config.engine.k)
        elif verdict:
            self._remember("rejected", reason=verdict["reason"], gain=verdict["gain"])

    def observe(self, item: Finished) -> None:
        """Count a finished request; feed drift detection and the watch over promotions."""
        for event in self.monitor.observe(item):
            self._drifted = True
            about = {"domain": event.domain, "direction": event.direction, "before": event.before, "after": event.after}
            self._remember("drift", **about)
            _log.warning(events.DRIFT_DETECTED, **about)
        self.watching.observe(item)
        self.trending.observe(item)

    def _learner_follows(self, reason: str) -> None:
        """Tell the learner that another version serves. One that is down or restarting sees it when it starts."""
        if self.learner is not None:
            self.learner.follow.remote(reason)

    def _remember(self, kind: str, **fields: Any) -> None:
        now = time.time()
        self.events = [*self.events[-255:], {"at": now, "kind": kind, **fields}]
        self.trending.remember(kind, now, fields)

    def _the_learner(self) -> Any:
        if self.learner is None:
            raise RequestRefused(
                "learning is off (learn.enabled is false): use `adaptd checkpoints` with the daemon stopped"
            )
        return self.learner

    async def rollback(self, reason: str) -> dict[str, Any]:
        """Publish the parent of the live version as a new version."""
        manifest: dict[str, Any] = await _cause(self._the_learner().rollback.remote(reason))
        self.watching.forget()
        self._remember("rollback", version=manifest["version"], reason=reason)
        return manifest

    async def promote(self, version: int, force: bool = False) -> dict[str, Any]:
        """Publish an earlier version again, and watch it; a quarantined one only if `force`, which lifts that."""
        live = self.store.current()
        manifest: dict[str, Any] = await _cause(self._the_learner().promote.remote(version, force))
        if manifest["version"] != live:
            self._remember("promoted by hand", version=manifest["version"])
            self.watching.promoted(manifest["version"], self.config.engine.k)
        return manifest

    async def buffer_status(self) -> dict[str, Any]:
        """Fill by stratum, or that the buffer cannot be reached."""
        try:
            info = await asyncio.to_thread(self.table.info)
        except TableUnavailable as error:
            return {"available": False, "error": str(error)}
        return {"available": True, "max_bytes": self.config.buffer.max_bytes, **dataclasses.asdict(info)}

    async def report(self, since: str, baseline: Baseline, traces: int) -> dict[str, Any]:
        """What `adaptd report` shows of a period; raises what `adaptd.app.reporting.report` raises."""
        config = self.config
        about = {"deployment": config.deployment, "engine": config.engine.kind, "k": config.engine.k}
        about |= {"adaptd_version": __version__, "draft_version": self.store.current() or 0}
        return await reporting.report(self.trending, self.table, since, baseline, traces, about)

    def versions(self) -> list[dict[str, Any]]:
        """Published versions, oldest first; `quarantine` says why one may not be promoted, if so."""
        refused = refusals(self.store)
        return [
            {**dataclasses.asdict(manifest), "quarantine": refused.get(manifest.version)}
            for manifest in self.store.versions()
        ]

    async def _take_down(self) -> None:
        """Stop ticking, then close everything that was opened, last first; safe after a failed start."""
        if hasattr(self, "_scheduler"):
            self._scheduler.shutdown(wait=False)
            await self.trending.write()
        for close in reversed(self._closing):
            await asyncio.to_thread(close)
        self._closing.clear()


async def _cause(call: Awaitable[Any]) -> Any:
    """The result of an actor call; an error of the actor's own comes back as it was raised there."""
    try:
        return await call
    except RayTaskError as error:
        raise error.cause if isinstance(error.cause, Exception) else error from None
