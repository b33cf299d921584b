"""The target must not change: its weights' checksums before and after every update of the draft."""

from __future__ import annotations

import hashlib
import time

from adaptd.errors import PublishFailed
from adaptd.sidecar.client import VllmClient

#: Longest hashing of the target's weights, in seconds, that is done while the server is paused; a longer one is done
#: right after, so that requests do not wait for it.
_PAUSED_S = 1.0

#: Digest of a tensor without elements.
_EMPTY = hashlib.sha256().hexdigest()


class TargetGuard:
    """Knows one server's target by its checksums, taken once a start of the server."""

    def __init__(self, client: VllmClient) -> None:
        self._client = client
        self._baseline: dict[str, str] = {}
        self._of: float | None = None
        self._seconds = 0.0
        self.broken = ""
        """Why nothing may be published any more; empty while the target is what it was."""

    @property
    def quick(self) -> bool:
        """Whether a paused server may be asked."""
        return self._seconds <= _PAUSED_S

    @property
    def coverage(self) -> str | None:
        """How much of the target is seen: vLLM's CPU build repacks linear layers and leaves their tensors empty."""
        if not self._baseline:
            return None
        seen = sum(digest != _EMPTY for digest in self._baseline.values())
        return f"{seen} of {len(self._baseline)}"

    async def know(self) -> None:
        """Take the checksums, unless they are known of this start of the server."""
        started_at = (await self._client.metrics()).started_at
        if self._baseline and started_at is not None and started_at == self._of:
            return
        began = time.perf_counter()
        self._baseline = await self._client.target_checksums()
        self._seconds = time.perf_counter() - began
        self._of = started_at

    async def check(self) -> None:
        """Compare.

        Raises:
          PublishFailed: (`target_changed`) they differ; `broken` says so from now on.
        """
        found, before = await self._client.target_checksums(), self._baseline
        changed = sorted(name for name in found.keys() | before.keys() if found.get(name) != before.get(name))
        if changed:
            self.broken = (
                f"{len(changed)} of the target's tensors are not what they were before the update, first {changed[0]}: "
                "outputs may differ from the target's; restart the server, then adaptd, and report this"
            )
            raise PublishFailed("target_changed", self.broken)
