"""The daemon with decoders of its own: builds everything, keeps the loop going, takes it down in order.

Shutdown order: refuse requests, drain the decoders, flush their writers, stop the scheduler, let a running tick finish or
leave it (nothing is half-published), stop the cluster, stop the embedded buffer, give the folder back.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from adaptd import __version__, events
from adaptd.app.adaptation import Adaptation
from adaptd.app.pool import DecoderPool
from adaptd.decoding.request import DecodeRequest, Delta
from adaptd.decoding.request import Finished as Answer
from adaptd.errors import Overloaded
from adaptd.log import logger
from adaptd.report import economics
from adaptd.report.monitor import Finished

_log = logger(__name__)


class Daemon(Adaptation):
    """One deployment: decoders, learner, buffer, store, monitor.

    Raises (from `start`):
      StateDirError: the folder cannot be used. VocabularyMismatch: target and draft do not fit.
    """

    async def start(self, url: str = "", after_cluster: Callable[[], None] | None = None) -> None:
        """Bring up folder, buffer, cluster, actors and scheduler; returns when requests can be served.

        Args:
          url: where the daemon listens, announced in its folder; empty if nowhere.
          after_cluster: called in the event loop's thread once Ray is up.
        """
        started = time.monotonic()
        await self._open()
        await self._join_cluster(after_cluster)
        self.pool = DecoderPool(self._cluster.decoders(self.buffer_url))
        versions = await self.pool.start()
        if self.learner is not None:
            # Before the first tick: what an earlier target judged is not what this one will say.
            await self.learner.follow_target.remote((await self.pool.status())[0]["target_id"])
        self._start_scheduler()
        self._start_ticking()
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
                share_at_k=stats.share_at_k,
            )
        )

    async def status(self) -> dict[str, Any]:
        """Everything `adaptd status` shows, as JSON values."""
        decoders, common = await asyncio.gather(self.pool.status(), self._common_status())
        self.snapshot = {
            **common,
            "in_flight": self.pool.in_flight,
            "decoders": decoders,
            "decoders_lost": self.pool.lost,
            "economics": economics.native(decoders, common["acceptance"]["now"]),
        }
        return self.snapshot

    def ready(self) -> tuple[bool, str]:
        """Whether a request would be served now, and the state in a word."""
        if self.draining:
            return False, "draining"
        if not self.serving:
            return False, "loading"
        return (True, "ready") if self.pool.up else (False, "no decoder is up")

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
        await self._take_down()
        _log.info(events.SERVICE_STOPPED, seconds=round(time.monotonic() - started, 2))
