"""Brings a newly published version into a running decode loop: read and check off the loop's thread, copy between rounds."""

from __future__ import annotations

import time
from typing import Any

from torch import Tensor

from adaptd import events
from adaptd.decoding.loop import DecodeLoop
from adaptd.decoding.loop_stats import SwapResult
from adaptd.learning.cycle import Identity
from adaptd.log import logger
from adaptd.models.scope import AdaptedDraft
from checkpoints.errors import CheckpointError
from checkpoints.manifest import Manifest
from checkpoints.store import CheckpointStore
from checkpoints.swap import check, copy_in_place

_log = logger(__name__)


class StoreFollower:
    """Follows CURRENT. A refused version is counted, logged once, and decoding goes on with the old weights."""

    def __init__(
        self, store: CheckpointStore, draft: AdaptedDraft, loop: DecodeLoop, identity: Identity, name: str
    ) -> None:
        self._store, self._draft, self._loop, self._identity, self._name = store, draft, loop, identity, name
        self.version = 0
        self._refused: int | None = None
        self.counts: dict[str, Any] = {
            "swaps": 0,
            "refusals": 0,
            "last_pause_s": None,
            "max_pause_s": 0.0,
            "swapped_at": None,
        }

    def poll(self) -> bool:
        """Swap if CURRENT moved; returns whether the version changed. Called from one thread at a time."""
        current = -1
        try:
            current = self._store.current() or 0
            if current in (self.version, self._refused):
                return False
            manifest, tensors = self._store.load(current)
            if tensors:
                check(manifest, tensors, self._draft.expected(), self._identity.base_id, self._identity.tokenizer_hash)
        except CheckpointError as error:
            self._refuse(current, error)
            return False
        report = self._loop.request_swap(lambda: self._apply(manifest, tensors)).result()
        self.counts["swaps"] += 1
        self.counts["last_pause_s"] = report.pause_s
        self.counts["max_pause_s"] = max(self.counts["max_pause_s"], report.pause_s)
        self.counts["swapped_at"] = time.time()
        _log.info(events.DRAFT_SWAPPED, decoder=self._name, version=current, pause_s=round(report.pause_s, 5))
        return True

    def _apply(self, manifest: Manifest, tensors: dict[str, Tensor]) -> SwapResult:
        size, version = 0, manifest.version
        if tensors:
            size = copy_in_place(self._draft.expected(), tensors, version=version).bytes
            self._draft.refresh()
        else:
            self._draft.reset()
        self._draft.keep_on_base(manifest.gate.get("on_base", ()))
        # The version advances after the copy: a reader never sees a number whose weights are not in place.
        self.version = version
        return SwapResult(version, len(tensors), size)

    def _refuse(self, version: int, error: CheckpointError) -> None:
        if version == self._refused:
            return
        self._refused = version
        self.counts["refusals"] += 1
        _log.warning(
            events.DRAFT_SWAP_REFUSED,
            decoder=self._name,
            version=version,
            reason=getattr(error, "reason", "error"),
            error=str(error),
        )
