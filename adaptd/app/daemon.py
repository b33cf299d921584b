"""The daemon: builds everything, keeps the loop going, takes it down in order.

Shutdown order: refuse requests, drain the decoders, flush their writers, stop the scheduler, let a running tick finish or
leave it (nothing is half-published), stop the cluster, stop the embedded buffer, give the folder back.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import aclosing
from typing import Any

from apscheduler.schedulers.asyncio import AsyncIOScheduler
from ray.exceptions import RayError, RayTaskError

import buffers.embedded
from adaptd import __version__, events
from adaptd.app.cluster import Cluster
from adaptd.app.pool import DecoderPool
from adaptd.app.state import StateDir
from adaptd.config import Config
from adaptd.decoding.request import DecodeRequest, Delta
from adaptd.decoding.request import Finished as Answer
from adaptd.errors import Overloaded, RequestRefused
from adaptd.log import logger
from adaptd.report.monitor import Finished, Monitor
from buffers.errors import TableUnavailable
from buffers.open import open_table
from checkpoints.store import CheckpointStore
from policies.gate import LiveWatch

_log = logger(__name__)
#: Seconds between two looks at the actors for /metrics, which must answer without asking them.
_SNAPSHOT_S = 5.0


class Daemon:
    """One deployment: decoders, learner, buffer, store, monitor.

    Raises (from `start`):
      StateDirError: the folder cannot be used. VocabularyMismatch: target and draft do not fit.
    """

    def __init__(self, config: Config, *, log_to_driver: bool = True) -> None:
        self.config = config
        self.monitor = Monitor(config.engine.k, config.drift.delta)
        self.store = CheckpointStore(config.home / "checkpoints")
        self.draining = False
        self.serving = False
        self.snapshot: dict[str, Any] | None = None
        self.started_at = time.time()
        self.events: list[dict[str, Any]] = []
        self.buffer_url = config.buffer.url
        self._log_to_driver = log_to_driver
        self._drifted = False
        self._last_tick = time.monotonic()
        self._watch: tuple[int, LiveWatch] | None = None
        self._baselines: dict[str, float] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closing: list[Any] = []

    async def start(self, url: str = "", after_cluster: Callable[[], None] | None = None) -> None:
        """Bring up folder, buffer, cluster, actors and scheduler; returns when requests can be served.

        Args:
          url: where the daemon listens, announced in its folder; empty if nowhere.
          after_cluster: called in the event loop's thread once Ray is up.
        """
        started = time.monotonic()
        self._state = StateDir(self.config.home)
        self._closing.append(self._state.close)
        self.store.recover()
        if self.config.buffer.url == "embedded":
            self._redis = await asyncio.to_thread(buffers.embedded.start_embedded, self.config.home / "redis")
            self.buffer_url = self._redis.url
            self._closing.append(lambda: self._redis.close())
        self.table = open_table(
            self.buffer_url, self.config.deployment, **self.config.buffer.model_dump(exclude={"url"})
        )
        self._cluster = await asyncio.to_thread(Cluster, self.config, log_to_driver=self._log_to_driver)
        self._closing.append(self._cluster.close)
        if after_cluster is not None:
            after_cluster()
        self.pool = DecoderPool(self._cluster.decoders(self.buffer_url))
        self.learner = self._cluster.learner(self.buffer_url) if self.config.learn.enabled else None
        versions = await self.pool.start()
        if self.learner is not None:
            # Before the first tick: what an earlier target judged is not what this one will say.
            await self.learner.follow_target.remote((await self.pool.status())[0]["target_id"])
        # A tick that is due while one runs is skipped by design; the scheduler would warn of each.
        logging.getLogger("apscheduler").setLevel(logging.ERROR)
        self._scheduler = AsyncIOScheduler()
        if self.learner is not None:
            # A tick is skipped, not queued, while one runs: the job awaits it, and one instance at a time is allowed.
            self._scheduler.add_job(
                self._tick,
                "interval",
                seconds=self.config.learn.poll_s,
                max_instances=1,
                coalesce=True,
                misfire_grace_time=None,
            )
        self._scheduler.start()
        self._scheduler.add_job(self.status, "interval", seconds=_SNAPSHOT_S, max_instances=1, coalesce=True)
        if self.config.buffer.url == "embedded":
            self._scheduler.add_job(self._keep_redis, "interval", seconds=_SNAPSHOT_S, max_instances=1, coalesce=True)
        if url:
            self._state.announce(url)
        self.serving = True
        _log.info(
            events.SERVICE_STARTED,
            version=__version__,
            deployment=self.config.deployment,
            decoders=self.config.engine.decoders,
            draft_version=max(versions),
            buffer=self.config.buffer.url,
            seconds=round(time.monotonic() - started, 2),
        )

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
            report = await self._the_learner().tick.remote(drifted, time.monotonic() - self._last_tick)
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
            self._arm_watch(report["published"])
        elif verdict:
            self._remember("rejected", reason=verdict["reason"], gain=verdict["gain"])

    def _arm_watch(self, version: int) -> None:
        """Each domain is watched against its own acceptance before the promotion: the mix of domains may move."""
        before = {name: row["now"]["token_acceptance"] for name, row in self.monitor.status()["domains"].items()}
        self._baselines = {name: share for name, share in before.items() if share is not None}
        overall = self.monitor.now()["token_acceptance"]
        if self.config.gate.watch and overall is not None:
            self._watch = (version, LiveWatch(overall, max_drop=self.config.gate.max_drop))

    async def generate(self, request: DecodeRequest, stream: bool) -> AsyncGenerator[Delta, None]:
        """Deltas of one request, counted and logged when it ends.

        Raises:
          Overloaded: draining, or the queue is full. DecoderStopped: the decoder died.
        """
        if self.draining or not self.serving:
            raise Overloaded(f"the daemon is {self.ready()[1]}; send the request to another replica or retry")
        started = time.monotonic()
        async with aclosing(self.pool.generate(request, stream)) as deltas:
            async for delta in deltas:
                if delta.finished is not None:
                    self._finish(request, delta.finished, time.monotonic() - started)
                yield delta

    def _finish(self, request: DecodeRequest, finished: Answer, seconds: float) -> None:
        stats = finished.stats
        _log.info(
            events.REQUEST_FINISHED,
            request_id=request.request_id,
            domain=request.domain,
            tokens=stats.emitted,
            rounds=stats.rounds,
            mal=round(stats.mal, 3),
            draft_version=stats.draft_version_max,
            finish_reason=finished.finish_reason,
            seconds=round(seconds, 4),
        )
        self.observe(
            Finished(
                domain=request.domain or "default",
                emitted=stats.emitted,
                rounds=stats.rounds,
                proposed=stats.proposed,
                accepted=stats.accepted,
                reached_at=stats.reached_at,
                accepted_at=stats.accepted_at,
                draft_version=stats.draft_version_max,
            )
        )

    def observe(self, item: Finished) -> None:
        """Count a finished request; feed drift detection and the watch over a promotion."""
        for event in self.monitor.observe(item):
            self._drifted = True
            about = {"domain": event.domain, "direction": event.direction, "before": event.before, "after": event.after}
            self._remember("drift", **about)
            _log.warning(events.DRIFT_DETECTED, **about)
        if self._watch is None or not item.proposed or item.draft_version < self._watch[0]:
            return
        version, watch = self._watch
        if item.domain not in self._baselines:
            return
        outcome = watch.update(item.accepted / item.proposed, self._baselines[item.domain])
        if outcome != "watching":
            self._watch = None
        if outcome == "worse" and self.store.current() == version:
            self._spawn(self.rollback("live acceptance fell after the promotion"))

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        """Run `work` beside the request that caused it; the reference keeps it from being collected half-way."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _remember(self, kind: str, **fields: Any) -> None:
        self.events = [*self.events[-255:], {"at": time.time(), "kind": kind, **fields}]

    def _the_learner(self) -> Any:
        if self.learner is None:
            raise RequestRefused(
                "learning is off (learn.enabled is false): use `adaptd checkpoints` with the daemon stopped"
            )
        return self.learner

    async def rollback(self, reason: str) -> dict[str, Any]:
        """Publish the parent of the live version as a new version."""
        manifest: dict[str, Any] = await _cause(self._the_learner().rollback.remote(reason))
        self._remember("rollback", version=manifest["version"], reason=reason)
        return manifest

    async def promote(self, version: int) -> dict[str, Any]:
        """Publish an earlier version again."""
        manifest: dict[str, Any] = await _cause(self._the_learner().promote.remote(version))
        self._remember("promoted by hand", version=manifest["version"])
        return manifest

    async def buffer_status(self) -> dict[str, Any]:
        """Fill by stratum, or that the buffer cannot be reached."""
        try:
            info = await asyncio.to_thread(self.table.info)
        except TableUnavailable as error:
            return {"available": False, "error": str(error)}
        return {"available": True, "max_bytes": self.config.buffer.max_bytes, **dataclasses.asdict(info)}

    async def status(self) -> dict[str, Any]:
        """Everything `adaptd status` shows, as JSON values."""
        decoders, buffer = await asyncio.gather(self.pool.status(), self.buffer_status())
        learner = await self.learner.status.remote() if self.learner is not None else None
        version = self.store.current() or 0
        self.snapshot = {
            "adaptd_version": __version__,
            "deployment": self.config.deployment,
            "engine": self.config.engine.kind,
            "k": self.config.engine.k,
            "uptime_s": time.time() - self.started_at,
            "draining": self.draining,
            "in_flight": self.pool.in_flight,
            "draft": {
                "version": version,
                "age_s": time.time() - self.store.manifest(version).created_at if version else None,
                "scope": self.config.adapt.scope,
            },
            "acceptance": self.monitor.status(),
            "buffer": buffer,
            "decoders": decoders,
            "decoders_lost": self.pool.lost,
            "learner": learner,
            "events": self.events[-32:],
        }
        return self.snapshot

    def ready(self) -> tuple[bool, str]:
        """Whether a request would be served now, and the state in a word."""
        if self.draining:
            return False, "draining"
        if not self.serving:
            return False, "loading"
        return (True, "ready") if self.pool.up else (False, "no decoder is up")

    def versions(self) -> list[dict[str, Any]]:
        """Published versions, oldest first."""
        return [dataclasses.asdict(manifest) for manifest in self.store.versions()]

    async def flush(self) -> None:
        """Write every pending trace to the buffer."""
        await self.pool.flush()

    async def stop(self) -> None:
        """Take everything down in order; safe after a failed start."""
        started = time.monotonic()
        self.draining = True
        if hasattr(self, "pool"):
            _log.info(events.SERVICE_DRAINING, in_flight=self.pool.in_flight)
            await self.pool.close(self.config.server.drain_s)
        if hasattr(self, "_scheduler"):
            self._scheduler.shutdown(wait=False)
        for close in reversed(self._closing):
            await asyncio.to_thread(close)
        self._closing.clear()
        _log.info(events.SERVICE_STOPPED, seconds=round(time.monotonic() - started, 2))


async def _cause(call: Awaitable[Any]) -> Any:
    """The result of an actor call; an error of the actor's own comes back as it was raised there."""
    try:
        return await call
    except RayTaskError as error:
        raise error.cause if isinstance(error.cause, Exception) else error from None
