"""Brings versions into one running vLLM server and sees to it that they stay.

    write -> probe -> pause -> start -> update -> finish -> checksum -> resume -> probe again

Invariants:
1. Whatever fails, and whenever, the server is resumed, and the version that served before is brought back if the draft
   may have changed.
2. The target's checksums before and after are equal. If they ever differ nothing more is published: outputs may have
   changed, which only a restart of the server undoes.
3. A version counts as serving only after all of that. What the server holds is labelled with version and content, so
   that a server that restarted or woke up without it is noticed (`look`) and gets it again.

Serving never waits for a publication except for the pause between two steps of the server, which `counts` reports.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from adaptd import events
from adaptd.errors import PublishFailed, UpstreamUnavailable
from adaptd.log import logger
from adaptd.sidecar.client import UpstreamRefused, VllmClient
from adaptd.sidecar.presence import Presence
from adaptd.sidecar.probes import Outcome, Probe, Prober, compare
from adaptd.sidecar.target import TargetGuard
from adaptd.sidecar.update import Update
from checkpoints.errors import CheckpointError

_log = logger(__name__)

#: Attempts to resume a paused server, and seconds between them: a server left paused is the outage adaptd must not be.
_RESUMES, _RESUME_WAIT_S = 5, 0.5

#: Label of the weights in the server: version and content.
_LABEL = re.compile(r"adaptd-v(\d+)-\w+")

#: Seconds between two looks at the server, and between two looks at one that keeps failing.
LOOK_S, _LONGEST_WAIT_S = 2.0, 60.0

#: File in the folder of updates that exists while the server is paused: a daemon that is killed then finds it again.
_PAUSED = "server-paused"


class Publisher:
    """Owns what one server drafts with. `publish` and `look` exclude each other.

    Args:
      client: of the server.
      write: gives the update of a version (0: day 0); `UpdateWriter.write` in a thread or another process.
      folder: of the update files, as the server sees it; None: as they are named here.
      prober: measures acceptance before and after; None: nothing is measured.
      seed: of the bootstrap.
    """

    def __init__(
        self,
        client: VllmClient,
        write: Callable[[int], Awaitable[Update]],
        *,
        folder: str | None = None,
        prober: Prober | None = None,
        seed: int = 0,
    ) -> None:
        self._client, self._write, self._folder, self._prober = client, write, folder, prober
        self._rng = np.random.default_rng(seed)
        self._lock = asyncio.Lock()
        self._serving: int | None = None
        self._presence = Presence(client)
        self._target = TargetGuard(client)
        #: Contents that broke their promise, with the reason: trying again would cost the traffic the same again.
        self._broken: dict[str, str] = {}
        self._last_error = ""
        self.last_outcome: Outcome | None = None
        self.counts: dict[str, Any] = {
            "published": 0,
            "failed": {},
            "restored": 0,
            "lost": 0,
            "last_pause_s": None,
            "max_pause_s": 0.0,
        }

    @property
    def version(self) -> int | None:
        """The version that the server drafts with, or will again at the next look; None before the first publication."""
        return self._serving

    async def publish(self, version: int) -> None:
        """Bring a version into the server; returns once it serves and does what the gate promised.

        Raises:
          PublishFailed: see there; the version that served before serves again, as far as the server lets it.
          UpstreamUnavailable: the server does not answer; `look` brings back what served when it does.
        """
        async with self._lock:
            try:
                await self._publish(version)
            except (PublishFailed, UpstreamUnavailable) as error:
                self.counts["failed"][_slug(error)] = self.counts["failed"].get(_slug(error), 0) + 1
                self._last_error = str(error)
                raise

    async def _publish(self, version: int) -> None:
        if self._target.broken:
            raise PublishFailed("target_changed", self._target.broken)
        started = time.perf_counter()
        update = await self._written(version)
        if update.content in self._broken:
            raise PublishFailed("acceptance", f"{self._broken[update.content]}; it is not tried again")
        prompts = await asyncio.to_thread(self._prober.prompts) if self._prober else []
        holds = await self.holds()
        before = await self._measured(prompts)
        try:
            await self._swap(update)
            await self._keep_promise(update, prompts, before, holds)
        except (PublishFailed, UpstreamUnavailable):
            await self._restore(version, holds or 0)
            raise
        self._serving = version
        self._last_error = ""
        self.counts["published"] += 1
        _log.info(
            events.DRAFT_INSTALLED,
            upstream=self._client.url,
            version=version,
            pause_s=round(self.counts["last_pause_s"], 4),
            seconds=round(time.perf_counter() - started, 3),
            bytes=update.file.bytes,
        )

    async def _written(self, version: int) -> Update:
        try:
            return await self._write(version)
        except CheckpointError as error:
            raise PublishFailed("checkpoint", str(error)) from error

    async def _measured(self, prompts: Sequence[Sequence[int]]) -> list[Probe]:
        if self._prober is None or not prompts:
            return []
        try:
            return await self._prober.measure(prompts)
        except UpstreamRefused as error:
            raise PublishFailed("unsupported", f"the probe prompts were refused: {error}") from error

    async def holds(self) -> int | None:
        """The version that the server drafts with by its own label; None: somebody else's.

        Raises:
          PublishFailed: (`unsupported`) it has no label. UpstreamUnavailable: it does not answer.
        """
        try:
            label = await self._client.weight_version()
        except UpstreamRefused as error:
            raise PublishFailed("unsupported", _remedy(error)) from error
        if label == "default":
            return 0
        return int(match[1]) if (match := _LABEL.fullmatch(label)) else None

    async def _keep_promise(
        self, update: Update, prompts: Sequence[Sequence[int]], before: Sequence[Probe], held: int | None
    ) -> None:
        after = await self._measured(prompts)
        # What was promised over one version says nothing of the gain over another.
        promised = update.promise.low if held == update.promise.over else None
        outcome = self.last_outcome = compare(before, after, promised, self._rng)
        if not outcome.kept:
            reason = self._broken[update.content] = f"version {update.version}: {outcome.reason}"
            raise PublishFailed("acceptance", reason)

    async def _swap(self, update: Update) -> None:
        """One update, from pause to resume.

        Raises:
          PublishFailed: `unsupported`, `refused`, `target_changed`.
          UpstreamUnavailable: the server does not answer.
        """
        folder = self._folder or str(update.file.path.parent)
        label = f"adaptd-v{update.version}-{update.content}"  # as _LABEL reads it
        try:
            await self._client.init_transfer(folder)
            await self._target.know()
            await self._update(str(Path(folder) / update.file.path.name), update, label)
            if not self._target.quick:
                await self._target.check()
            await self._presence.arrived(label)
        except UpstreamRefused as error:
            raise PublishFailed("unsupported", _remedy(error)) from error

    async def _update(self, path: str, update: Update, label: str) -> None:
        marker = update.file.path.parent / _PAUSED
        paused_at = time.perf_counter()
        try:
            marker.touch()
            await self._client.pause()
            await self._start()
            try:
                await self._client.update(path, update.file.sha256)
            except UpstreamRefused as error:
                raise PublishFailed("refused", f"version {update.version}: {error.text}") from error
            await self._client.finish_update(label)
            if self._target.quick:
                await self._target.check()
        finally:
            # Shielded: a daemon that is being stopped must not leave the server paused.
            await asyncio.shield(self._resume(marker))
            pause = self.counts["last_pause_s"] = time.perf_counter() - paused_at
            self.counts["max_pause_s"] = max(self.counts["max_pause_s"], pause)

    async def _start(self) -> None:
        """Open a session; one that a dead publisher left open is closed first (it has changed nothing)."""
        try:
            await self._client.start_draft_update()
        except UpstreamRefused as error:
            if "already active" not in error.text:
                raise
            await self._client.finish_update()
            await self._client.start_draft_update()

    async def _resume(self, marker: Path) -> None:
        """Resume, again and again if need be.

        Raises:
          UpstreamUnavailable: the server is gone, and its pause with it.
        """
        for attempt in range(_RESUMES):
            try:
                await self._client.resume()
                marker.unlink(missing_ok=True)
                return
            except (UpstreamUnavailable, UpstreamRefused) as error:
                if attempt == _RESUMES - 1:
                    raise UpstreamUnavailable(
                        f"the server at {self._client.url} could not be resumed ({error}): POST /resume, or restart it"
                    ) from error
                await asyncio.sleep(_RESUME_WAIT_S)

    async def recover(self, folder: Path) -> bool:
        """Resume a server that was left paused, by a daemon that was killed or by a connection that failed; whether it had to.

        `folder`: of the update files.

        Raises:
          UpstreamUnavailable: the server does not answer.
        """
        marker = folder / _PAUSED
        if not marker.exists():
            return False
        async with self._lock:
            if not marker.exists():  # a publication was under way, and has resumed it
                return False
            await self._resume(marker)
        return True

    async def _restore(self, failed: int, held: int) -> None:
        """Bring back what served before `failed`, or day 0 if that cannot be read or loaded.

        What fails here is logged, and `look` goes on trying. `held`: what the server held by its own label.
        """
        if self._target.broken:
            return
        previous = held if self._serving is None else self._serving
        # Until a version has arrived the server's label proves nothing: the update may have come to its end unlabelled.
        self._serving, self._presence.label = previous, ""
        for version in dict.fromkeys((previous, 0)):
            try:
                await self._swap(await self._written(version))
            except (PublishFailed, UpstreamUnavailable) as error:
                _log.warning(
                    events.DRAFT_RESTORE_FAILED,
                    upstream=self._client.url,
                    version=version,
                    reason=_slug(error),
                    error=str(error),
                )
                if isinstance(error, UpstreamUnavailable) or self._target.broken:
                    return
                continue
            self._serving = version
            self._restored(version, f"version {failed} did not stay")
            return

    def _restored(self, version: int, reason: str) -> None:
        self.counts["restored"] += 1
        _log.info(events.DRAFT_RESTORED, upstream=self._client.url, version=version, reason=reason)

    async def look(self) -> bool:
        """One look at the server; brings the version back if it was lost, and returns whether it had to.

        Raises:
          PublishFailed, UpstreamUnavailable: as `publish`.
        """
        async with self._lock:
            if self._serving is None or self._target.broken:
                return False
            try:
                reason = await self._presence.loss()
            except UpstreamRefused as error:
                raise PublishFailed("unsupported", _remedy(error)) from error
            if not reason:
                return False
            self.counts["lost"] += 1
            version = self._serving
            _log.warning(events.DRAFT_LOST, upstream=self._client.url, version=version, reason=reason)
            await self._swap(await self._written(version))
            self._restored(version, reason)
            return True

    async def run(self, interval_s: float = LOOK_S) -> None:
        """Look again and again, until cancelled. A server that is away is reported once, and asked less and less often."""
        wait = interval_s
        while True:
            await asyncio.sleep(wait)
            try:
                await self.look()
                wait = interval_s
            except (PublishFailed, UpstreamUnavailable) as error:
                self._last_error = str(error)
                if wait == interval_s:
                    _log.warning(
                        events.DRAFT_RESTORE_FAILED,
                        upstream=self._client.url,
                        version=self.version,
                        reason=_slug(error),
                        error=str(error),
                    )
                wait = min(2 * wait, max(_LONGEST_WAIT_S, interval_s))

    async def settle(self, seconds: float = 10.0) -> bool:
        """Begin nothing any more and let what is under way end; whether it did within `seconds`.

        What did not is to be cancelled and awaited before `close`, which would take the way to resume the server.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                return await self._lock.acquire()
        return False

    async def close(self) -> None:
        """Close the connections, after `settle`; the server keeps what it has."""
        await self._client.close()

    def status(self) -> dict[str, Any]:
        """Plain JSON values for `adaptd status`."""
        outcome = self.last_outcome
        return {
            "upstream": self._client.url,
            "version": self.version,
            "label": self._presence.label or None,
            "halted": self._target.broken or None,
            "last_error": self._last_error or None,
            "target_tensors_checked": self._target.coverage,
            "last_probe": None if outcome is None else outcome.reason,
            **self.counts,
        }


def _slug(error: PublishFailed | UpstreamUnavailable) -> str:
    return error.reason if isinstance(error, PublishFailed) else "unavailable"


def _remedy(error: UpstreamRefused) -> str:
    """What to change at the server, from its answer."""
    if error.status in (404, 405):
        return f"{error}: start the server with VLLM_SERVER_DEV_MODE=1"
    if "not configured" in error.text or "init_info" in error.text:
        return f'{error}: start the server with --weight-transfer-config \'{{"backend": "adaptd_disk"}}\''
    if "raft" in error.text:
        return f"{error}: start the server with --speculative-config and method draft_model"
    return str(error)
