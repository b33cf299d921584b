"""The daemon beside a vLLM server: the proxy in front of it, and the loop behind.

Requests pass from the moment the port is open: what is below only ever adds to them. Shutdown order: not ready, wait for
the answers in flight, write the pending traces, then as every daemon.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from adaptd import __version__, events
from adaptd.app.adaptation import Adaptation
from adaptd.app.publication import Publication
from adaptd.app.publishing import reserved_prompts
from adaptd.config import Config
from adaptd.errors import ConfigError
from adaptd.log import logger
from adaptd.models import load
from adaptd.report import economics
from adaptd.report.monitor import Finished, Monitor
from adaptd.sidecar.capture import Captured, CaptureThread
from adaptd.sidecar.fleet import Fleet, Server
from adaptd.sidecar.headers import Labels
from adaptd.sidecar.load import plain_rate
from adaptd.sidecar.proxy import Done, Proxy
from adaptd.sidecar.request import Plan, plan
from adaptd.sidecar.rollout import Rollout
from adaptd.sidecar.share import CaptureShare
from adaptd.sidecar.steps import Figures, figures
from adaptd.sidecar.traces import Provenance, settings
from buffers.writer import TraceWriter, WriterStats

_log = logger(__name__)
_DRAIN_POLL_S = 0.05
#: Seconds between two looks at the server's metrics.
_METER_S = 5.0


class SidecarDaemon(Adaptation):
    """One deployment in front of one server, or several of one target.

    Raises:
      ConfigError: the configuration asks for what vLLM does not tell, or for versions in the server that it cannot take.
    Raises (from `start`):
      StateDirError: the folder cannot be used. ConfigError: there is no such draft.
    """

    def __init__(self, config: Config, *, log_to_driver: bool = True) -> None:
        if config.capture.positions != "all":
            raise ConfigError(
                f"capture.positions ({config.capture.positions!r}) must be 'all' with engine.kind vllm, which does not "
                "say which tokens were rejected"
            )
        super().__init__(config, log_to_driver=log_to_driver)
        self._turn = asyncio.Lock()
        self.upstream = Fleet(config.upstream)
        self.rollout = Rollout(self.upstream, lambda: self.store.current() or 0, lambda: self.watching.settled)
        self.publications = [self._publication(config, server, i) for i, server in enumerate(self.upstream.servers)]
        self._target_id = ""
        learn = config.learn
        self.share = CaptureShare(
            config.upstream.capture_share,
            config.upstream.capture_budget,
            useful=learn.batch_traces * learn.steps_per_tick,
            tick_s=learn.interval_s,
            uniform=random.Random(config.seed).random,
        )
        self._capture: CaptureThread | None = None
        self._writer: TraceWriter | None = None
        self.proxy = Proxy(
            self.upstream,
            self._plan,
            self._report,
            share=self.share,
            development_routes=config.upstream.development_routes,
        )

    def _publication(self, config: Config, server: Server, index: int) -> Publication:
        """What brings versions into one server; files of several do not meet."""
        publication = Publication(
            config.model_copy(update={"upstream": server.config}),
            self.rollout.stage(server),
            server.upstream,
            prompts=lambda: reserved_prompts(self.table)(),
            remember=self._remember if not self.upstream.several else partial(self._remember, upstream=server.name),
            rollback=self._refuse,
            part=str(index) if self.upstream.several else "",
            turn=self._turn,
        )
        server.version, server.takes_drafts = lambda: publication.version, lambda: publication.active
        return publication

    async def _refuse(self, version: int, reason: str) -> None:
        """The probe prompts speak against a version. Where live traffic has confirmed it, it is that server's trouble."""
        if version == self.store.current() and not (self.upstream.several and version == self.watching.settled):
            await self.watching.refuse(version, reason)

    async def start(self, url: str = "", after_cluster: Callable[[], None] | None = None) -> None:
        """Bring up folder, buffer, learner and scheduler; requests pass already.

        Args:
          url: where the daemon listens, announced in its folder; empty if nowhere.
          after_cluster: called in the event loop's thread once Ray is up.
        """
        started = time.monotonic()
        load.resolve(self.config.draft.model, "draft")
        await self._open()
        self._writer = TraceWriter(self.table, max_pending=self.config.capture.max_pending)
        for publication in self.publications:
            await publication.recover()
        await self.upstream.wait(self.config.upstream.wait_s)
        self._adopt_k()
        self._capture = CaptureThread(self._writer.append, self.config.capture.max_pending)
        self._start_scheduler()
        self._every(self.config.upstream.poll_s, self._look)
        self._every(_METER_S, self.upstream.sample)
        if url:
            self._state.announce(url)
        self.serving = True
        # Last, and not waited for: traces are worth having before there is somebody to learn from them.
        await self._join_cluster(after_cluster)
        self._follow_server()
        self._start_ticking()
        for publication in self.publications:
            publication.start()
        _log.info(
            events.SERVICE_STARTED,
            version=__version__,
            deployment=self.config.deployment,
            decoders=0,
            draft_version=self.store.current() or 0,
            buffer=self.config.buffer.url,
            seconds=round(time.monotonic() - started, 2),
        )

    async def _look(self) -> None:
        await self.upstream.poll()
        self._follow_server()

    def _follow_server(self) -> None:
        """The learner follows what the server turned out to be, at whatever time it came up."""
        if self._adopt_k() and self.learner is not None:
            self.learner = self._cluster.learner_again(self.learner, self.config, self.buffer_url)
            self._target_id = ""
        target_id = self.upstream.capabilities.target_id
        if self.learner is not None and target_id not in ("", self._target_id):
            # Not awaited: calls are served in order, and the next one is the tick that it must precede.
            self.learner.follow_target.remote(target_id)
            self._target_id = target_id

    def _adopt_k(self) -> bool:
        """The server decides how many tokens are drafted a step: gate and monitor count at its depth; whether it moved."""
        k = self.upstream.capabilities.k
        if k is None or k == self.config.engine.k:
            return False
        engine = self.config.engine.model_copy(update={"k": k})
        self.config = self.config.model_copy(update={"engine": engine})
        self.monitor = Monitor(k, self.config.drift.delta)
        return True

    def _plan(self, path: str, body: bytes, labels: Labels) -> Plan | None:
        able = self.upstream.capabilities
        if not able.models:
            return None
        return plan(
            path,
            body,
            top_logprobs=able.top_logprobs,
            capture=self._why_not(labels),
            ask_usage=not able.usage_forced and not able.reason,
            models=able.models,
        )

    def _why_not(self, labels: Labels) -> str | None:
        """Why a request is not captured, whatever is in it; None if it may be."""
        if self._capture is None:
            return "starting"
        if not labels.store:
            return "opted out"
        return self.share.why_not()

    def _report(self, done: Done) -> None:
        """Count an answer, hand it to the capture thread. Called in the event loop, after the client has its answer."""
        found = figures(done.seen.speculative)
        self.observe(_finished(done, found, self.config.engine.k))
        _log.info(
            events.REQUEST_FINISHED,
            request_id=done.seen.answer_id,
            domain=done.labels.domain,
            tokens=done.seen.tokens,
            rounds=found.rounds if found else 0,
            mal=round(1 + found.accepted / found.rounds, 3) if found and found.rounds else None,
            draft_version=done.draft_version,
            finish_reason=next((c.finish_reason for c in done.seen.choices.values()), None),
            seconds=round(done.seconds, 4),
        )
        if done.plan.captured and self._capture is not None:
            self._capture.put(Captured(done.seen, found, self._provenance(done)))

    def _provenance(self, done: Done) -> Provenance:
        config = self.config
        temperature, top_p, top_k = settings(done.plan.sampling, config.upstream.temperature)
        return Provenance(
            target_id=self.upstream.capabilities.target_id,
            draft_version=done.draft_version,
            domain=done.labels.domain,
            tenant=done.labels.tenant,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            max_tokens=config.capture.max_tokens,
            reserved_share=config.capture.reserved_share,
        )

    async def status(self) -> dict[str, Any]:
        """Everything `adaptd status` shows, as JSON values; the server stands for the decoders."""
        capture, writer = self._capture, self._writer
        stats = writer.stats() if writer else WriterStats(0, 0, 0, 0, 0, False, None)
        self.snapshot = {
            **await self._common_status(),
            "in_flight": self.proxy.counts.in_flight,
            "decoders": [
                {
                    "draft_version": publication.version,
                    "engine": {"recalled": 0, "again": 0, "alternatives": 0},
                    "swap": publication.swaps(),
                    # There is one, for all of them.
                    "writer": dataclasses.asdict(WriterStats(0, 0, 0, 0, 0, False, None) if i else stats),
                }
                for i, publication in enumerate(self.publications)
            ],
            "decoders_lost": 0,
            "economics": self._economics(),
            "upstream": {
                "url": ", ".join(server.name for server in self.upstream.servers),
                "up": self.upstream.up,
                "error": self.upstream.error,
                "since": self.upstream.since,
                "servers": [
                    {**server.status(), "publisher": publication.status()}
                    for server, publication in zip(self.upstream.servers, self.publications, strict=True)
                ],
                "canary": self.rollout.canary,
                "capture": self.share.status(),
                **dataclasses.asdict(self.upstream.capabilities),
            },
            "publisher": self._first().status(),
            "proxy": {
                **dataclasses.asdict(self.proxy.counts),
                "uncaptured": dict(self.proxy.counts.uncaptured),
                "built": capture.built if capture else 0,
                "dropped": capture.dropped if capture else 0,
                "refused": dict(capture.refused) if capture else {},
            },
        }
        return self.snapshot

    def _first(self) -> Publication:
        """The one that takes versions first."""
        names = [server.name for server in self.upstream.servers]
        return self.publications[names.index(self.rollout.canary) if self.rollout.canary in names else 0]

    def _economics(self) -> dict[str, Any]:
        load, given = self.upstream.load(), self.config.upstream.plain_tokens_per_s
        plain = None if given is None or load is None else plain_rate(given, load.running)
        return economics.behind_proxy(load, plain, self.config.engine.k)

    def ready(self) -> tuple[bool, str]:
        """Whether a request would be served now: the server alone decides, not the learner."""
        if self.draining:
            return False, "draining"
        return (True, "ready") if self.upstream.up else (False, f"the server is not up: {self.upstream.error}")

    async def flush(self) -> None:
        """Write every pending trace to the buffer."""
        if self._capture is not None and self._writer is not None:
            await asyncio.to_thread(self._capture.flush)
            await asyncio.to_thread(self._writer.flush, 5.0)

    async def stop(self) -> None:
        """Take everything down in order; safe after a failed start."""
        started = time.monotonic()
        self.draining = True
        _log.info(events.SERVICE_DRAINING, in_flight=self.proxy.counts.in_flight)
        while self.proxy.counts.in_flight and time.monotonic() - started < self.config.server.drain_s:
            await asyncio.sleep(_DRAIN_POLL_S)
        self.proxy.closing = True
        for part in (self._capture, self._writer):
            if part is not None:
                await asyncio.to_thread(part.close, 5.0)
        for publication in self.publications:
            await publication.close()
        await self._take_down()
        await self.upstream.close()
        _log.info(events.SERVICE_STOPPED, seconds=round(time.monotonic() - started, 2))


def _finished(done: Done, found: Figures | None, k: int) -> Finished:
    """Counts of one answer as the server gives them: emitted / rounds is its own mean acceptance length."""
    if found is None:
        return Finished(done.labels.domain, 0, 0, 0, 0, (), (), done.draft_version)
    reached, accepted = found.steps.by_depth() if found.steps else ((), ())
    return Finished(
        domain=done.labels.domain,
        emitted=found.rounds + found.accepted,
        rounds=found.rounds,
        proposed=found.proposed,
        accepted=found.accepted,
        reached_at=reached[:k],
        accepted_at=accepted[:k],
        draft_version=done.draft_version,
    )
