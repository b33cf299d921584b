"""The daemon's side of the time series: what is written, what an outage costs, what a period shows."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adaptd.app.trending import Trending
from adaptd.config import Config, load
from adaptd.errors import RequestRefused
from adaptd.report.monitor import Finished
from buffers.errors import TableUnavailable
from buffers.memory_series import MemorySeries
from buffers.memory_table import MemoryTable
from buffers.series import Point
from buffers.synthetic import synthetic_trace
from buffers.table import TableLimits

START = 1_700_000_100.0
LIMITS = TableLimits(max_bytes=10**8, ttl_s=None, anchors=4, reserved_max_bytes=10**7)


class Clock:
    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> float:
        return self.now


class Flaky(MemorySeries):
    """Away when told."""

    away = False

    def add(self, points: Any) -> None:
        if self.away:
            raise TableUnavailable("redis is gone")
        super().add(points)

    def remember(self, kind: str, at: float, **details: Any) -> None:
        if self.away:
            raise TableUnavailable("redis is gone")
        super().remember(kind, at, **details)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def series(clock: Clock) -> Flaky:
    return Flaky(8, clock)


@pytest.fixture
def table(clock: Clock) -> MemoryTable:
    return MemoryTable("d", LIMITS, clock)


@pytest.fixture
def trending(tmp_path: Path, clock: Clock, series: Flaky, table: MemoryTable) -> Trending:
    found = Trending(settings(tmp_path), clock)
    found.connect(series, table)
    return found


def settings(home: Path, *sets: str) -> Config:
    return load(None, [f"state_dir={home}", "trends.domains=8", *sets])


def served(domain: str = "math", accepted: int = 6) -> Finished:
    return Finished(domain, 4 + accepted, 4, 16, accepted, (4, 3, 2, 1), (3, 2, 1, 0), 2)


def read(trending: Trending, since: str = "15m") -> dict[str, Any]:
    return asyncio.run(trending.read(since))


def test_a_period_shows_what_was_served_by_domain_and_in_all(trending: Trending, clock: Clock) -> None:
    for _ in range(3):
        trending.observe(served())
    clock.now += 120
    trending.observe(served("code", accepted=0))
    found = read(trending)
    assert (found["since"], found["step_s"], found["to"] - found["from"]) == ("15m", 60, 900.0)
    lines = found["domains"]
    assert set(lines) == {"math", "code", "all"}
    assert len(found["at"]) == len(lines["math"]["mal"]) == 16
    at = found["at"].index(START)
    assert lines["math"]["requests"][at : at + 3] == [3, 0, 0]
    assert lines["math"]["mal"][at : at + 3] == [2.5, None, None]
    assert lines["code"]["token_acceptance"][at + 2] == 0.0
    assert lines["all"]["tokens"][at : at + 3] == [30, 0, 4]
    assert found["summary"]["all"]["mal"] == 34 / 16
    assert found["summary"]["math"]["by_depth"][0] == {"reached": 12, "accepted": 9, "acceptance": 0.75}
    assert found["summary"]["math"]["by_depth"][3]["acceptance"] == 0.0
    assert len(found["summary"]["math"]["by_depth"]) == 4


def test_events_are_shown_by_the_names_of_the_series_and_others_are_not(trending: Trending, clock: Clock) -> None:
    trending.remember("drift", START, {"domain": "math", "direction": "down", "before": 0.5, "after": 0.3})
    trending.remember("promoted by hand", START + 1, {"version": 4})
    trending.remember("rollback", START + 2, {"version": 6, "refused": [4, 5], "reason": "worse"})
    trending.remember("confirmed", START + 3, {"version": 6})
    clock.now += 10
    found = read(trending)
    kinds = [(e["kind"], e.get("version")) for e in found["events"]]
    assert kinds == [
        ("drift", None),
        ("promoted", 4),
        ("rolled_back", 6),
        ("quarantined", 4),
        ("quarantined", 5),
    ]
    assert [v["version"] for v in found["versions"]] == [4, 6]
    assert found["events"][-1]["reason"] == "worse"


def test_an_outage_costs_nothing_that_comes_back_within_the_hour(
    trending: Trending, series: Flaky, clock: Clock
) -> None:
    series.away = True
    trending.observe(served())
    trending.remember("promoted", START, {"version": 1})
    found = read(trending)
    assert found["domains"]["all"]["requests"] == []
    assert "redis is gone" in trending.status()["error"]
    assert trending.status()["waiting"] == 1
    series.away = False
    clock.now += 600
    trending.observe(served())
    found = read(trending)
    assert (found["summary"]["math"]["requests"], len(found["events"])) == (2, 1)
    assert trending.status() == {
        "on": True,
        "waiting": 0,
        "written": 2,
        "lost": 0,
        "events_lost": 0,
        "error": None,
    }


def test_a_longer_outage_costs_points_which_are_counted(trending: Trending, series: Flaky, clock: Clock) -> None:
    series.away = True
    trending.observe(served())
    trending.observe(served())
    for i in range(300):
        trending.remember("rejected", START + i, {"reason": "no gain"})
    clock.now += 2 * 3600
    trending.observe(served())
    read(trending)
    assert trending.status()["lost"] == 2
    assert trending.status()["events_lost"] == 44
    assert trending.status()["waiting"] == 1


def test_names_of_a_client_do_not_grow_the_memory(trending: Trending, series: Flaky, clock: Clock) -> None:
    series.away = True
    for i in range(2000):
        trending.observe(served(f"name-{i}"))
    assert len(trending._minutes) <= 60 * 8 + 1
    assert trending.status()["waiting"] == 2000


def test_what_came_before_the_store_was_there_is_written_later(
    tmp_path: Path, clock: Clock, series: Flaky, table: MemoryTable
) -> None:
    trending = Trending(settings(tmp_path), clock)
    trending.observe(served())
    with pytest.raises(RequestRefused, match="loading"):
        read(trending)
    trending.connect(series, table)
    clock.now += 1
    assert read(trending)["summary"]["math"]["requests"] == 1


def test_switched_off_nothing_is_kept_and_the_remedy_is_named(
    tmp_path: Path, clock: Clock, series: Flaky, table: MemoryTable
) -> None:
    trending = Trending(settings(tmp_path, "trends.enabled=false"), clock)
    trending.connect(series, table)
    trending.observe(served())
    asyncio.run(trending.write())
    assert series.read(START).counts == {}
    with pytest.raises(RequestRefused, match=r"trends\.enabled"):
        read(trending)


@pytest.mark.parametrize("since", ["", "yesterday", "7 parsecs", "2999-01-01", "0s"])
def test_what_is_no_time_is_refused(trending: Trending, since: str) -> None:
    with pytest.raises(RequestRefused, match="since"):
        read(trending, since)


def test_traces_are_counted_once_by_entropy_and_token_group(
    trending: Trending, table: MemoryTable, clock: Clock
) -> None:
    rng = np.random.default_rng(0)
    traces = [synthetic_trace(rng, vocabulary=500, domain="math", created_at=START) for _ in range(3)]
    table.insert(traces[:1], [1.0])
    asyncio.run(trending.write())  # what an earlier daemon saw is not counted again
    table.insert(traces[1:], [1.0, 1.0])
    clock.now += 60
    row = read(trending)["summary"]["math"]
    judged = sum(int(np.isin(t.source, (0, 1)).sum()) for t in traces[1:])
    rejected = sum(int((t.source == 0).sum()) for t in traces[1:])
    assert judged > rejected > 0
    assert sum(b["judged"] for b in row["by_entropy"]) == judged
    assert sum(b["accepted"] for b in row["by_entropy"]) == judged - rejected
    assert sum(g["judged"] for g in row["by_group"].values()) == judged
    assert sum(g["rejected"] for g in row["by_group"].values()) == rejected
    assert read(trending)["summary"]["math"] == row


def test_other_rules_of_the_groups_leave_out_what_was_counted_by_the_old_ones(
    tmp_path: Path, trending: Trending, series: Flaky, table: MemoryTable, clock: Clock
) -> None:
    asyncio.run(trending.write())
    counts = np.zeros(25, np.int64)
    counts[[0, 17, 18]] = 1, 5, 2
    series.add([Point(START, "math", counts)])
    clock.now += 60
    assert read(trending)["summary"]["math"]["by_group"]["whitespace"] == {"judged": 5, "rejected": 2, "rate": 0.4}
    again = Trending(settings(tmp_path, "trends.groups={units: kg|cm}"), clock)
    again.connect(series, table)
    row = read(again)["summary"]["math"]
    assert next(iter(row["by_group"])) == "units"
    assert {g["judged"] for g in row["by_group"].values()} == {0}
    assert row["requests"] == 1


def test_a_fault_in_a_trace_costs_points_only(trending: Trending, table: MemoryTable, clock: Clock) -> None:
    def broken(*_: Any) -> Any:
        raise KeyError("no such thing")

    asyncio.run(trending.write())
    table.all = broken  # type: ignore[method-assign]
    trending.observe(served())
    clock.now += 1
    assert read(trending)["summary"]["math"]["requests"] == 1
    assert "KeyError" in trending.status()["error"]
