"""Whether a server still holds the version that was brought into it: it restarts, sleeps and is updated by others."""

from __future__ import annotations

from adaptd.sidecar.client import VllmClient
from adaptd.sidecar.metrics import SpecCounters

#: Proposals without one acceptance that make a draft look dead, where earlier ones were accepted. Random weights are
#: accepted now and then; weights thrown away are not.
_DEAD_AFTER = 256


class Presence:
    """What was left in one server, and whether it is still there."""

    def __init__(self, client: VllmClient) -> None:
        self._client = client
        self.label = ""
        self.started_at: float | None = None
        self._slept = False
        self._seen: SpecCounters | None = None
        self._alive = False

    async def arrived(self, label: str) -> None:
        """A version has just been brought in under this label."""
        self.label = label
        metrics = await self._client.metrics()
        self.started_at = metrics.started_at
        self._slept, self._alive, self._seen = False, False, metrics.counters

    async def loss(self) -> str:
        """Why the version is no longer there, as a sentence; empty while it is, or while the server sleeps."""
        if await self._client.sleeping():
            self._slept = True
            return ""
        label = await self._client.weight_version()
        metrics = await self._client.metrics()
        if metrics.started_at != self.started_at:
            return "the server restarted"
        if label != self.label:
            return f"the server was updated by others or restarted: it holds {label!r}"
        if self._slept:
            # Sleep of level 2 throws the draft's weights away and wakes up with the label still on.
            return "the server slept"
        return self._dead(metrics.counters)

    def _dead(self, counters: SpecCounters) -> str:
        """A sleep between two looks leaves no other trace: outputs stay right, only acceptance dies."""
        window = counters if self._seen is None else counters - self._seen
        if window.accepted > 0:
            self._seen, self._alive = counters, True
        elif window.draft_tokens >= _DEAD_AFTER and self._alive:
            self._seen, self._alive = counters, False
            return f"none of the last {window.draft_tokens:.0f} proposals was accepted"
        return ""
