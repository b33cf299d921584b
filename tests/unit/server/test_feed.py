"""The status as server-sent events: shared, bounded, quiet where nothing moves, over when the daemon drains."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest

from adaptd.errors import Overloaded
from adaptd.server.feed import Pace, StatusFeed

PACE = Pace(status_s=0.01, alive_s=0.05, draining_s=0.005, viewers=3)


class Daemon:
    """What a feed needs, with a count of how often it was asked."""

    def __init__(self) -> None:
        self.state, self.asked, self.broken = "ready", 0, False
        self.said: dict[str, Any] = {"in_flight": 0, "draft": {"version": 1, "age_s": 0.0}}

    def ready(self) -> tuple[bool, str]:
        return self.state == "ready", self.state

    async def status(self, since: str | None) -> dict[str, Any]:
        assert since is None
        self.asked += 1
        if self.broken:
            raise RuntimeError("prompt text")
        draft = {**self.said["draft"], "age_s": float(self.asked)}
        return {**self.said, "draft": draft, "uptime_s": float(self.asked)}


def run(test: Callable[[Daemon, StatusFeed], Awaitable[None]]) -> None:
    async def bounded() -> None:
        daemon = Daemon()
        async with asyncio.timeout(10):
            await test(daemon, StatusFeed(daemon, PACE))  # type: ignore[arg-type]

    asyncio.run(bounded())


async def next_of(kind: str, events: Any) -> Any:
    async for event in events:
        if event.startswith(f"event: {kind}\n".encode()):
            return json.loads(event.decode().split("data: ")[1])
    raise AssertionError(f"the stream ended without {kind}")


def test_a_viewer_gets_what_changed_and_signs_of_life_while_nothing_does() -> None:
    async def test(daemon: Daemon, feed: StatusFeed) -> None:
        events = feed.events()
        assert (await anext(events)).startswith(b"retry: ")
        assert (await next_of("status", events))["in_flight"] == 0
        assert (await anext(events)).startswith(b"event: alive"), "clocks alone are no news"
        daemon.said = {**daemon.said, "in_flight": 5}
        assert (await next_of("status", events))["in_flight"] == 5
        await events.aclose()

    run(test)


def test_many_viewers_cost_the_daemon_as_much_as_one_and_none_costs_nothing() -> None:
    async def test(daemon: Daemon, feed: StatusFeed) -> None:
        viewers = [feed.events() for _ in range(3)]
        for viewer in viewers:
            await next_of("status", viewer)
        assert feed.viewers == 3
        before = daemon.asked
        await asyncio.sleep(0.2)
        assert daemon.asked - before <= 21
        with pytest.raises(Overloaded, match="3 viewers"):
            feed.admit()
        for viewer in viewers:
            await viewer.aclose()
        await asyncio.sleep(0)
        before = daemon.asked
        await asyncio.sleep(0.1)
        assert (daemon.asked, feed.viewers) == (before, 0)
        feed.admit()
        daemon.said = {**daemon.said, "in_flight": 9}
        again = feed.events()
        assert (await next_of("status", again))["in_flight"] == 9, "nobody is shown what an earlier viewer saw"
        await again.aclose()

    run(test)


def test_a_viewer_that_comes_as_the_last_one_leaves_is_served() -> None:
    async def test(daemon: Daemon, feed: StatusFeed) -> None:
        first = feed.events()
        await next_of("status", first)
        await first.aclose()
        second = feed.events()
        daemon.said = {**daemon.said, "in_flight": 3}
        assert (await next_of("status", second))["in_flight"] == 3
        assert feed.viewers == 1
        await second.aclose()

    run(test)


def test_a_slow_viewer_misses_some_and_gets_the_newest() -> None:
    async def test(daemon: Daemon, feed: StatusFeed) -> None:
        slow = feed.events()
        await next_of("status", slow)
        for n in range(1, 20):
            daemon.said = {**daemon.said, "in_flight": n}
            await asyncio.sleep(0.02)
        assert (await next_of("status", slow))["in_flight"] == 19
        await slow.aclose()

    run(test)


def test_a_status_that_fails_is_told_without_its_text_and_the_next_one_is_sent_again() -> None:
    async def test(daemon: Daemon, feed: StatusFeed) -> None:
        events = feed.events()
        await next_of("status", events)
        daemon.broken = True
        assert await next_of("failed", events) == {"error": "the daemon's log has the details"}
        daemon.broken = False
        await next_of("status", events)
        await events.aclose()

    run(test)


def test_streams_end_when_the_daemon_drains_and_nobody_is_let_in() -> None:
    async def test(daemon: Daemon, feed: StatusFeed) -> None:
        viewers = [feed.events() for _ in range(2)]
        for viewer in viewers:
            await next_of("status", viewer)
        daemon.state = "draining"
        for viewer in viewers:
            async for event in viewer:
                assert not event.startswith(b"event: failed")
        with pytest.raises(Overloaded, match="draining"):
            feed.admit()

    run(test)


def test_the_route_streams_over_a_real_connection_and_refuses_while_draining(url: str, service: Any) -> None:
    with httpx.Client(base_url=url, timeout=10, trust_env=False) as client:
        with client.stream("GET", "/adaptd/stream") as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            assert answer.headers["x-accel-buffering"] == "no"
            lines = answer.iter_lines()
            assert next(line for line in lines if line.startswith("event:")) == "event: status"
            assert json.loads(next(lines).removeprefix("data: "))["draft"] == {"version": 3}
            service.is_ready = (False, "draining")
            assert not [line for line in lines if line.startswith("event: status")], "it ends by itself"
        refused = client.get("/adaptd/stream")
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
