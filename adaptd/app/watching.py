"""The watch over promotions as a daemon runs it: kept over restarts, and what it refuses goes back by itself.

Going back does not wait for the learner, which may be in the middle of a tick: the daemon writes the quarantine and the
store, decoders and publishers follow the store, and the learner is told to follow too. What that tick would publish rests
on a version that no longer serves, and the store refuses it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from adaptd import events
from adaptd.config import GateConfig
from adaptd.learning.quarantine import quarantine_file, take_back
from adaptd.log import logger
from adaptd.report.monitor import Finished
from checkpoints import atomic
from checkpoints.errors import CheckpointError
from checkpoints.store import CheckpointStore
from policies.watch import ChainWatch, Confirmed, Regression, Window

_log = logger(__name__)
#: Before going back is tried again when the store could not be written.
_RETRY_S = 5.0


class Watching:
    """Owns the watch of one daemon.

    Args:
      path: file of what a restart must not forget.
      windows: the traffic before a promotion, by domain.
      remember: takes an event for the status: its kind, and fields.
      went_back: called after versions went back, with the reason.
    """

    def __init__(
        self,
        config: GateConfig,
        store: CheckpointStore,
        path: Path,
        *,
        windows: Callable[[], Mapping[str, Window]],
        remember: Callable[..., None],
        went_back: Callable[[str], None],
    ) -> None:
        self._config, self._store, self._path = config, store, path
        self._windows, self._remember, self._went_back = windows, remember, went_back
        self._chain = ChainWatch(max_requests=config.watch_requests, max_drop=config.max_drop)
        self._task: asyncio.Task[None] | None = None
        self._settled = 0
        self.counts = {"confirmed": 0, "rolled_back": 0}

    @property
    def before(self) -> tuple[int, ...]:
        """The version that may have to come back, if any; it must not be pruned."""
        before = self._chain.before
        return () if before is None else (before,)

    @property
    def settled(self) -> int:
        """The newest version that needs no watching any more; what serves, if nothing is watched at all."""
        return self._settled if self._config.watch else self._store.current() or 0

    def resume(self) -> None:
        """Go on watching what the daemon before this one left unconfirmed; a damaged file is as none."""
        with contextlib.suppress(FileNotFoundError):
            try:
                self._chain.resume(json.loads(self._path.read_text(encoding="ascii")), self._store.current() or 0)
            except (OSError, ValueError, KeyError, TypeError) as error:
                if isinstance(error, FileNotFoundError):
                    raise
                _log.warning(events.WATCH_LOST, error=f"{type(error).__name__}: {error}"[:200])
        before = self._chain.before
        self._settled = (self._store.current() or 0) if before is None else before

    def promoted(self, version: int, k: int) -> None:
        """Watch a version that serves from now on, against the traffic until now."""
        if not self._config.watch or self._going_back or self._store.current() != version:
            return
        if version in self._chain.unconfirmed:
            return
        manifest = self._store.manifest(version)
        gain = None if manifest.restored is not None else (manifest.gate.get("gain") or {}).get("low")
        self._chain.promoted(version, manifest.parent or 0, self._windows(), gain=gain, k=k)
        self._save()

    def catch_up(self, k: int) -> None:
        """Watch what serves though nobody told of its promotion: the learner died before it could."""
        current = self._store.current() or 0
        if current not in (0, self._settled, *self._chain.unconfirmed):
            self.promoted(current, k)

    def observe(self, item: Finished) -> None:
        """Count a finished request; called in the event loop."""
        if item.share is None:
            return
        found = self._chain.observe(item.draft_version, item.domain, item.share)
        if isinstance(found, Confirmed):
            self.counts["confirmed"] += 1
            self._settled = found.version
            self._remember("confirmed", version=found.version, reason=found.reason, promise=self._chain.promise)
            _log.info(events.DRAFT_CONFIRMED, version=found.version, reason=found.reason, promise=self._chain.promise)
            self._save()
        elif found is not None:
            self._task = asyncio.create_task(self._go_back(found))

    @property
    def _going_back(self) -> bool:
        return self._task is not None and not self._task.done()

    async def _go_back(self, found: Regression) -> None:
        while True:
            try:
                manifest = await asyncio.to_thread(take_back, self._store, found.back_to, found.refused, found.reason)
                break
            except CheckpointError as error:
                self._remember("rollback failed", refused=list(found.refused), error=str(error)[:200])
                _log.error(events.DRAFT_ROLLBACK_FAILED, refused=list(found.refused), error=str(error)[:200])
                await asyncio.sleep(_RETRY_S)
        self.counts["rolled_back"] += 1
        self._chain.taken_back(manifest.version)
        before = self._chain.before
        self._settled = manifest.version if before is None else before
        self._save()
        self._remember("rollback", version=manifest.version, refused=list(found.refused), reason=found.reason)
        _log.warning(
            events.DRAFT_ROLLED_BACK, version=manifest.version, refused=list(found.refused), reason=found.reason
        )
        self._went_back(found.reason)

    async def refuse(self, version: int, reason: str) -> None:
        """Quarantine a version that something else than its live acceptance speaks against, and go back from it."""
        if self._going_back or not version:
            return
        parent = self._store.manifest(version).parent or 0
        self._chain.forget()
        self._task = asyncio.create_task(self._go_back(Regression(parent, (version,), reason)))
        await asyncio.shield(self._task)

    def forget(self) -> None:
        """An operator went back by hand: what serves now is not compared with anything."""
        self._chain.forget()
        self._settled = self._store.current() or 0
        self._save()

    def _save(self) -> None:
        # What is lost with a full disk is a watch over a restart.
        with contextlib.suppress(OSError):
            atomic.replace_text(self._path, json.dumps(self._chain.dump()) + "\n")

    def status(self) -> dict[str, Any]:
        """Plain JSON values: the watch, counts, and what is quarantined with the reasons."""
        try:
            entries = quarantine_file(self._store).entries()
            quarantined: dict[str, Any] = {str(version): entry.reason for version, entry in entries.items()}
            error = None
        except CheckpointError as damaged:
            quarantined, error = {}, str(damaged)
        return {
            "on": self._config.watch,
            "settled": self.settled,
            **self._chain.status(),
            **self.counts,
            "quarantined": quarantined,
            "quarantine_error": error,
        }
