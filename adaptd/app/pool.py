"""Requests to decoder actors: the least loaded one that is up; a dead one fails its requests with a retryable error."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from adaptd import events
from adaptd.decoding.request import DecodeRequest, Delta
from adaptd.errors import DecoderStopped
from adaptd.log import logger

_log = logger(__name__)
_PING_S = 0.5


class DecoderPool:
    """Balances over decoder actors.

    Args:
      handles: Ray actor handles of `DecoderActor`.
    """

    def __init__(self, handles: Sequence[Any]) -> None:
        self._handles = list(handles)
        self._in_flight = [0] * len(handles)
        self._down: dict[int, asyncio.Task[None]] = {}
        self.lost = 0

    @property
    def in_flight(self) -> int:
        """Requests being served."""
        return sum(self._in_flight)

    @property
    def up(self) -> int:
        """Decoders that take requests."""
        return len(self._handles) - len(self._down)

    async def start(self) -> list[int]:
        """Wait until every decoder is ready; their draft versions."""
        return list(await asyncio.gather(*(handle.start.remote() for handle in self._handles)))

    async def generate(self, request: DecodeRequest, stream: bool) -> AsyncGenerator[Delta, None]:
        """Deltas of one request; see `DecoderActor.generate`.

        Raises:
          DecoderStopped: no decoder is up, or the one that had the request died.
        """
        index = self._choose()
        self._in_flight[index] += 1
        answer = self._handles[index].generate.options(num_returns="streaming").remote(request, stream)
        finished = False
        try:
            async for reference in answer:
                delta: Delta = await reference
                finished = delta.finished is not None
                yield delta
        except RayActorError as error:
            self._lose(index, error)
            raise DecoderStopped(f"decoder {index} died while it held the request; send it again") from error
        except RayTaskError as error:
            raise error.cause if isinstance(error.cause, Exception) else error from None
        finally:
            self._in_flight[index] -= 1
            if not finished:
                ray.cancel(answer)  # the client went away: the decoder stops working for it

    def _choose(self) -> int:
        up = [i for i in range(len(self._handles)) if i not in self._down]
        if not up:
            raise DecoderStopped("no decoder is up: they are being restarted; send the request again")
        return min(up, key=lambda i: self._in_flight[i])

    def _lose(self, index: int, error: Exception) -> None:
        if index not in self._down:
            self.lost += 1
            _log.error(events.DECODER_LOST, decoder=index, error=type(error).__name__)
            self._down[index] = asyncio.create_task(self._wait_until_up(index))

    async def _wait_until_up(self, index: int) -> None:
        """Ray restarts the actor; `start` answers once it has loaded its models and followed the store."""
        while True:
            try:
                await self._handles[index].start.remote()
            except RayActorError:
                await asyncio.sleep(_PING_S)
                continue
            del self._down[index]
            return

    async def status(self) -> list[dict[str, Any]]:
        """One status per decoder that is up."""
        up = [h for i, h in enumerate(self._handles) if i not in self._down]
        found = await asyncio.gather(*(h.status.remote() for h in up), return_exceptions=True)
        return [s for s in found if isinstance(s, dict)]

    async def flush(self) -> None:
        """Have every decoder write its pending traces."""
        await asyncio.gather(*(h.flush.remote() for h in self._handles))

    async def close(self, drain_s: float) -> None:
        """Let decoders finish what they hold, at most `drain_s` seconds."""
        closing = asyncio.gather(*(h.close.remote(drain_s) for h in self._handles), return_exceptions=True)
        await asyncio.wait_for(closing, timeout=drain_s + 5)
