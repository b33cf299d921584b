"""Merging and cancelling: whatever way a request ends, every generator that was started is closed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from adaptd.errors import DecoderStopped
from adaptd.server.service import Chunk
from adaptd.server.streams import EventStream, merged


class Source:
    """A generator of `n` chunks, the last with a finish reason, that notes how it ended."""

    def __init__(self, n: int, *, error: Exception | None = None, hang: bool = False, finish: bool = True) -> None:
        self.n, self.error, self.hang, self.finish = n, error, hang, finish
        self.ended = "not started"

    async def chunks(self) -> AsyncGenerator[Chunk, None]:
        self.ended = "running"
        try:
            for index in range(self.n):
                await asyncio.sleep(0)
                yield Chunk(str(index), 1, "stop" if self.finish and index == self.n - 1 else None)
            if self.error is not None:
                raise self.error
            if self.hang:
                await asyncio.sleep(60)
            self.ended = "exhausted"
        finally:
            if self.ended == "running":
                self.ended = "closed"


async def drain(*sources: Source) -> list[tuple[int, str]]:
    return [(index, chunk.text) async for index, chunk in merged([source.chunks() for source in sources])]


def test_chunks_keep_the_order_of_their_generator_and_all_arrive() -> None:
    sources = [Source(200), Source(3), Source(100)]
    got = asyncio.run(drain(*sources))
    for index, source in enumerate(sources):
        assert [text for i, text in got if i == index] == [str(n) for n in range(source.n)]
        assert source.ended == "exhausted", "what a service does after its last chunk has to run"


def test_one_failure_closes_the_others_and_is_raised() -> None:
    sources = [Source(2, error=DecoderStopped("died"), finish=False), Source(5, hang=True, finish=False)]
    with pytest.raises(DecoderStopped, match="died"):
        asyncio.run(drain(*sources))
    assert [source.ended for source in sources] == ["closed", "closed"]


def test_a_generator_that_just_ends_is_a_failure() -> None:
    with pytest.raises(DecoderStopped, match="before the answer was complete"):
        asyncio.run(drain(Source(3, finish=False)))


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_closing_the_merger_closes_every_generator_also_behind_a_full_queue(taken: int) -> None:
    async def run() -> list[str]:
        sources = [Source(1000), Source(4, hang=True, finish=False)]
        stream = merged([source.chunks() for source in sources])
        for _ in range(taken):
            await anext(stream)
        await asyncio.sleep(0.01)
        await stream.aclose()
        return [source.ended for source in sources]

    assert asyncio.run(run()) == (["closed", "closed"] if taken else ["not started", "not started"])


def test_a_slow_reader_holds_the_generators_back() -> None:
    async def run() -> int:
        produced = 0

        async def endless() -> AsyncGenerator[Chunk, None]:
            nonlocal produced
            while True:
                produced += 1
                yield Chunk("x", 1)

        stream = merged([endless()])
        await anext(stream)
        await asyncio.sleep(0.02)
        await stream.aclose()
        return produced

    assert asyncio.run(run()) < 100


def test_a_client_that_is_gone_before_the_first_event_still_closes_the_source() -> None:
    """Starlette then never starts the outer generator, and closing an unstarted generator runs none of its clean-up."""

    async def run() -> str:
        source = Source(4, hang=True, finish=False)
        stream = merged([source.chunks()])
        await anext(stream)

        async def events() -> AsyncGenerator[bytes, None]:
            async for _, chunk in stream:
                yield chunk.text.encode()

        async def receive() -> Any:
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            await asyncio.sleep(60)

        await EventStream(events(), stream)({"type": "http", "asgi": {"spec_version": "2.3"}}, receive, send)
        return source.ended

    assert asyncio.run(run()) == "closed"
