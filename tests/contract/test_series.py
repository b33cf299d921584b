"""The one contract of all time series, in memory and in a real Redis."""

from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import numpy as np
import pytest

from buffers.connection import connect
from buffers.embedded import start_embedded
from buffers.errors import TableUnavailable
from buffers.memory_series import MemorySeries
from buffers.redis_series import RedisSeries
from buffers.series import EVENTS, OTHER, RINGS, Point, Series

MINUTE, QUARTER, COARSE = RINGS
START = 1_700_000_100.0  # begins a quarter of an hour
assert START % 900 == 0


class Clock:
    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    server = start_embedded(tmp_path_factory.mktemp("redis"))
    yield server.url
    server.close()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["memory", pytest.param("redis", marks=pytest.mark.redis)])
def series(request: pytest.FixtureRequest, clock: Clock) -> Series:
    if request.param == "memory":
        return MemorySeries(3, clock)
    return RedisSeries(request.getfixturevalue("url"), f"test-{uuid4().hex}", 3, clock)


def point(at: float, *counts: int, domain: str = "math") -> Point:
    return Point(at, domain, np.array(counts, np.int64))


def test_points_add_up_in_every_ring(series: Series, clock: Clock) -> None:
    clock.now = START + 200
    series.add([point(START + 5, 1, 2), point(START + 59, 1, 0, 7), point(START + 130, 1)])
    series.add([point(START + 6, 1, 1, domain="code")])
    fine = series.read(START)
    assert (fine.step_s, fine.at) == (60, [START, START + 60, START + 120, START + 180])
    assert fine.counts["math"].tolist() == [[2, 2, 7], [0, 0, 0], [1, 0, 0], [0, 0, 0]]
    assert fine.counts["code"].tolist() == [[1, 1], [0, 0], [0, 0], [0, 0]]
    for ring in (QUARTER, COARSE):
        coarse = series.read(clock.now - ring.reach_s)
        assert (coarse.step_s, len(coarse.at)) == (ring.step_s, ring.slots)
        assert coarse.counts["math"].sum(0).tolist() == [3, 2, 7]


def test_a_period_is_read_from_the_finest_ring_that_reaches_back(series: Series, clock: Clock) -> None:
    for age, step in ((60, 60), (86400, 60), (86401, 900), (14 * 86400, 900), (15 * 86400, 7200), (9e9, 7200)):
        assert series.read(clock.now - age).step_s == step


def test_an_end_before_now_cuts_the_window(series: Series, clock: Clock) -> None:
    clock.now = START + 600
    series.add([point(START, 1), point(START + 300, 2)])
    assert series.read(START, START + 119).counts["math"].tolist() == [[1], [0]]


def test_a_bucket_that_comes_round_begins_at_zero(series: Series, clock: Clock) -> None:
    series.add([point(START, 5)])
    clock.now = START + MINUTE.reach_s
    series.add([point(clock.now, 1)])
    assert series.read(clock.now - 60).counts["math"].tolist() == [[0], [1]]
    # A point of the turn before comes too late for the fine ring, and is not mistaken for one of today.
    series.add([point(START + 1, 9)])
    assert series.read(clock.now - 60).counts["math"].tolist() == [[0], [1]]
    assert series.read(START - 1).counts["math"].sum() == 15


def test_a_count_ends_at_its_ceiling(series: Series) -> None:
    series.add([point(START, 2**32 - 2), point(START, 5)])
    assert series.read(START).counts["math"].tolist() == [[2**32 - 1]]


def test_domains_beyond_the_bound_are_other(series: Series) -> None:
    series.add([point(START, 1, domain=name) for name in ("a", "b/c", "d", "e", "f", "a")])
    found = series.read(START).counts
    assert {name: int(rows.sum()) for name, rows in found.items()} == {"a": 2, "b/c": 1, "d": 1, OTHER: 2}


def test_a_domain_that_no_ring_shows_any_more_gives_its_place_up_with_its_rows(series: Series, clock: Clock) -> None:
    series.add([point(START, 1, domain=name) for name in ("a", "b", "c")])
    clock.now = START + COARSE.reach_s - 1
    series.add([point(clock.now, 1, domain=name) for name in ("a", "b", "new")])
    assert set(series.read(clock.now).counts) == {"a", "b", OTHER}
    clock.now += 2
    series.add([point(clock.now, 1, domain="new")])
    assert "new" in series.read(clock.now).counts
    if isinstance(series, RedisSeries):
        client = connect(series._url)
        rows = [name for key in series.keys[1:4] for name in client.hkeys(key)]  # type: ignore[union-attr]
        assert rows
        assert not [name for name in rows if name.endswith(b"/c")]
        client.close()


def test_events_come_in_order_and_are_bounded_by_kind(series: Series) -> None:
    series.remember("promoted", START + 1, version=3, gain={"mean": 0.1, "low": 0.0, "high": 0.2})
    for i in range(EVENTS + 10):
        series.remember("rejected", START + 2 + i, reason="no gain")
    series.remember("drift", START, domain="math")
    found = series.events(START)
    assert [event["kind"] for event in found[:2]] == ["drift", "promoted"]
    assert found[1]["gain"]["high"] == 0.2
    assert len(found) == EVENTS + 2
    assert [e["at"] for e in found] == sorted(e["at"] for e in found)
    assert series.events(START + 2, ["promoted"]) == []


def test_a_long_text_of_an_event_is_cut(series: Series) -> None:
    series.remember("rejected", START, reason="x" * 5000, error="y" * 5000)
    (event,) = series.events(START)
    assert event["reason"] == "x" * len(event["reason"])
    assert 0 < len(event["reason"]) <= 300


def test_what_is_wrong_is_refused_by_name(series: Series) -> None:
    with pytest.raises(ValueError, match="kind"):
        series.remember("excitement", START)
    with pytest.raises(ValueError, match="at least 0"):
        series.add([point(START, -1)])
    with pytest.raises(ValueError, match="whole numbers"):
        series.add([Point(START, "a", np.array([0.5]))])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="domains"):
        MemorySeries(0)


def test_what_was_described_and_counted_is_gone_after_a_reset(series: Series) -> None:
    assert series.about() == ""
    series.describe("groups: a, b")
    series.add([point(START, 1)])
    series.remember("drift", START)
    assert series.about() == "groups: a, b"
    series.reset()
    assert (series.about(), series.events(0), series.read(START).counts) == ("", [], {})


@pytest.mark.redis
def test_two_processes_add_to_one_series_and_it_survives_a_restart_of_redis(tmp_path: Path) -> None:
    server = start_embedded(tmp_path)
    try:
        one, two = (RedisSeries(server.url, "d") for _ in range(2))
        at = one._clock()
        one.add([point(at, 1, 2)])
        two.add([point(at, 1, 2)])
        two.remember("promoted", at, version=1)
        server.close()
        with pytest.raises(TableUnavailable):
            one.add([point(at, 1, 2)])
        server = start_embedded(tmp_path)
        again = RedisSeries(server.url, "d")
        assert again.read(at - 60).counts["math"].sum(0).tolist() == [2, 4]
        assert again.events(0)[0]["version"] == 1
    finally:
        server.close()
