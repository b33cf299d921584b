"""Async plumbing under the completion routes: several generators as one stream, and work that ends when the client leaves.

Invariant: whatever way a request ends (finished, refused, cancelled, client gone), every generator that was started is
closed, so no decoder works for nobody.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Sequence
from typing import Any, TypeVar

from anyio import CancelScope
from starlette.requests import ClientDisconnect, Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from adaptd.errors import DecoderStopped
from adaptd.server.service import Chunk

T = TypeVar("T")

#: Chunks that may wait for a slow client before its generators are held back.
_PENDING = 64


async def merged(generators: Sequence[AsyncGenerator[Chunk, None]]) -> AsyncGenerator[tuple[int, Chunk], None]:
    """The chunks of all generators with the index of theirs, as they come; ends when all have ended.

    Raises:
        DecoderStopped: a generator ended without a finish reason.
        Exception: whatever a generator raised; the others are closed.
    """
    queue: asyncio.Queue[tuple[int, Chunk | Exception | None]] = asyncio.Queue(_PENDING)
    pumps = [asyncio.create_task(_pump(index, generator, queue)) for index, generator in enumerate(generators)]
    unfinished, running = set(range(len(generators))), len(generators)
    try:
        while running:
            index, item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is not None:
                if item.finish_reason is not None:
                    unfinished.discard(index)
                yield index, item
            elif index in unfinished:
                raise DecoderStopped("the decoder ended before the answer was complete; send the request again")
            else:
                running -= 1
    finally:
        for pump in pumps:
            pump.cancel()
        with CancelScope(shield=True):
            await asyncio.gather(*pumps, return_exceptions=True)


async def _pump(
    index: int, generator: AsyncGenerator[Chunk, None], queue: asyncio.Queue[tuple[int, Chunk | Exception | None]]
) -> None:
    try:
        async for chunk in generator:
            await queue.put((index, chunk))
        await queue.put((index, None))
    except Exception as exc:  # handed to the consumer, which raises it
        await queue.put((index, exc))
    finally:
        await generator.aclose()


async def unless_disconnected(request: Request, work: Coroutine[object, object, T]) -> T:
    """The result of `work`, which is cancelled if the client goes away first. The request's body must have been read.

    Raises:
        ClientDisconnect: the client went away.
    """
    working = asyncio.create_task(work)
    watching = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        with CancelScope(shield=True):
            await asyncio.gather(working, watching, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """Server-sent events that close their generators however the response ends.

    Args:
        events: the encoded events.
        source: the generator under `events`. It is closed here as well: a client that leaves before the first event is
            sent leaves `events` unstarted, and closing an unstarted generator runs none of its clean-up.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], source: AsyncGenerator[Any, None]) -> None:
        # Proxies such as nginx buffer a response unless told not to.
        super().__init__(events, headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        self._closing = (events, source)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events; a client that leaves ends the generator."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            with CancelScope(shield=True):
                for generator in self._closing:
                    await generator.aclose()
