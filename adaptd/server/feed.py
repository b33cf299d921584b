"""The status as server-sent events: one reader of the daemon for all who look, and no reader while nobody does.

A viewer is sent the newest status when there is one, so a slow one misses some and holds nobody up. Streams end when the
daemon drains; what is left of its state can be asked for at /adaptd/status.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Any

from adaptd import events
from adaptd.errors import Overloaded
from adaptd.log import logger
from adaptd.server.service import Operations

_log = logger(__name__)


@dataclass(frozen=True, slots=True)
class Pace:
    """How often, and for how many; seconds."""

    status_s: float = 2.0
    """Between two looks at the daemon."""
    alive_s: float = 10.0
    """Longest silence: then an event `alive` says that the connection stands."""
    draining_s: float = 0.25
    """Between two looks at whether the daemon drains."""
    retry_s: float = 3.0
    """Before a viewer whose connection broke comes again."""
    viewers: int = 64
    """Any further one is refused."""


@dataclass
class StatusFeed:
    """Gives every viewer the status as it changes. For one event loop.

    Args:
        service: the daemon.
        pace: how often it is asked.
    """

    service: Operations
    pace: Pace = field(default_factory=Pace)
    viewers: int = 0
    _event: bytes = b""
    _seen: Any = None
    _number: int = 0
    _news: asyncio.Event = field(default_factory=asyncio.Event)
    _reader: asyncio.Task[None] | None = None

    def admit(self) -> None:
        """Refuse a viewer that is one too many, or comes to a daemon that drains.

        Raises:
            Overloaded: it may look at /adaptd/status instead.
        """
        if self._draining:
            raise Overloaded("the daemon is draining; ask /adaptd/status")
        if self.viewers >= self.pace.viewers:
            raise Overloaded(f"{self.pace.viewers} viewers follow the status already; ask /adaptd/status now and then")

    @property
    def _draining(self) -> bool:
        return self.service.ready()[1] == "draining"

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Events for one viewer until the daemon drains.

        `status` has the JSON of /adaptd/status, `failed` says that there is none, `alive` that nothing moved.
        """
        self.viewers += 1
        if self._reader is None:
            # What was read for an earlier viewer may be old.
            self._event, self._seen, self._news = b"", None, asyncio.Event()
            self._reader = asyncio.create_task(self._read())
        seen, reader = -1, self._reader
        try:
            yield f"retry: {int(1000 * self.pace.retry_s)}\n\n".encode()
            while not reader.done():
                if self._event and self._number != seen:
                    seen = self._number
                    yield self._event
                    continue
                news = asyncio.create_task(self._news.wait())
                try:
                    done, _ = await asyncio.wait(
                        (news, reader), timeout=self.pace.alive_s, return_when=asyncio.FIRST_COMPLETED
                    )
                finally:
                    news.cancel()
                if not done:
                    yield b"event: alive\ndata: {}\n\n"
        finally:
            self.viewers -= 1
            if not self.viewers:
                reader.cancel()
                self._reader = None

    async def _read(self) -> None:
        """Ask the daemon again and again; ends when it drains."""
        while not self._draining:
            try:
                self._tell("status", await self.service.status(None))
            except Exception as error:  # a bug: viewers keep what they have and see that it is old
                _log.error(events.STATUS_FAILED, error=type(error).__name__)
                self._tell("failed", {"error": "the daemon's log has the details"})
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._drained(), self.pace.status_s)

    async def _drained(self) -> None:
        while not self._draining:
            await asyncio.sleep(self.pace.draining_s)

    def _tell(self, kind: str, told: Mapping[str, Any]) -> None:
        seen = (kind, _without_clocks(told))
        if seen == self._seen:
            return
        self._seen, self._number = seen, self._number + 1
        self._event = f"event: {kind}\ndata: {json.dumps(told, allow_nan=False, separators=(',', ':'))}\n\n".encode()
        news, self._news = self._news, asyncio.Event()
        news.set()


def _without_clocks(status: Mapping[str, Any]) -> dict[str, Any]:
    """But for what moves with the clock alone, which makes no new status."""
    draft = {key: value for key, value in (status.get("draft") or {}).items() if key != "age_s"}
    return {**status, "uptime_s": None, "draft": draft}
