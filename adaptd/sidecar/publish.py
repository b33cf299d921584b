"""Brings published versions into the server, through whatever knows how.

The seam is `DraftPublisher`. Without one, versions stay in the store, and the status says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

from adaptd import events
from adaptd.log import logger

_log = logger(__name__)


class DraftPublisher(Protocol):
    """Puts a version of the store into the running server."""

    @property
    def version(self) -> int | None:
        """What the server drafts with; None before the first publication."""
        ...

    async def publish(self, version: int) -> None:
        """Returns when the server drafts with this version; 0 is day 0.

        Raises:
          Exception: it does not; whatever it drafted with before is at work again.
        """
        ...


class HasCurrent(Protocol):
    """What a follower follows."""

    def current(self) -> int | None:
        """The version that is to serve; None is day 0."""
        ...


class PublishFollower:
    """Follows CURRENT with a publisher. A version that fails is tried again after a pause; serving goes on meanwhile.

    Args:
      store: says which version is to serve, a `CheckpointStore` or a stage of a rollout.
      publisher: None if there is none: nothing is brought in.
      retry_s: pause before a version that failed is tried again.
      clock: seconds, monotonic.
      failed: is told of each failure, the version first.
    """

    def __init__(
        self,
        store: HasCurrent,
        publisher: DraftPublisher | None,
        retry_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
        failed: Callable[[int, Exception], None] = lambda version, error: None,
    ) -> None:
        self._store, self._publisher, self._retry_s, self._clock, self._tell = store, publisher, retry_s, clock, failed
        self.foreign = False
        """Whether the server held something unknown before the first publication: then even day 0 is published."""
        self._failed: tuple[int, float] | None = None
        self.counts: dict[str, Any] = {
            "swaps": 0,
            "refusals": 0,
            "last_s": None,
            "swapped_at": None,
        }

    @property
    def version(self) -> int:
        """What the server drafts with, as far as known: 0 until something was published."""
        return (self._publisher.version if self._publisher else None) or 0

    @property
    def _settled(self) -> int | None:
        """The version that needs no publication."""
        if self._publisher is None or self._publisher.version is None:
            return None if self.foreign else 0
        return self._publisher.version

    async def poll(self) -> bool:
        """Publish if CURRENT moved; whether the server got another version. Raises nothing."""
        current = self.version
        try:
            current = self._store.current() or 0
            if self._publisher is None or current == self._settled or self._waits(current):
                return False
            started = self._clock()
            await self._publisher.publish(current)
        except Exception as error:  # a publisher's failure costs a better draft, never a request
            self._failed = (current, self._clock())
            self.counts["refusals"] += 1
            _log.error(events.DRAFT_PUBLISH_FAILED, version=current, error=f"{type(error).__name__}: {error}"[:200])
            self._tell(current, error)
            return False
        seconds = self._clock() - started
        self._failed = None
        self.counts["swaps"] += 1
        self.counts["last_s"] = seconds
        self.counts["swapped_at"] = time.time()
        _log.info(events.DRAFT_PUBLISHED, version=current, seconds=round(seconds, 4))
        return True

    def _waits(self, version: int) -> bool:
        return (
            self._failed is not None and self._failed[0] == version and self._clock() - self._failed[1] < self._retry_s
        )
