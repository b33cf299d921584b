"""Trends on the terminal."""

from __future__ import annotations

from typing import Any

import numpy as np
from rich.console import Console

from adaptd.report.columns import WIDTH
from adaptd.report.status import _series_row
from adaptd.report.tables import spark
from adaptd.report.trend_tables import chunks, trend_tables
from adaptd.report.trends import tables, trends
from buffers.series import Window

START = 1_700_000_100


def made(events: list[dict[str, Any]], buckets: int = 100) -> dict[str, Any]:
    rows = np.zeros((buckets, WIDTH), np.int64)
    rows[:, :5] = 1, 20, 10, 40, 10
    rows[-1, :5] = 1, 50, 10, 40, 40
    rows[10:40] = 0
    window = Window(60, START, {"math": rows})
    by_domain = tables(window, 0.0)
    return trends("2h", START, START + 60 * buckets, window, by_domain, events, ("numerals", "other"))


def printed(found: dict[str, Any]) -> str:
    console = Console(width=160, record=True, file=None, quiet=False)
    with console.capture() as said:
        for item in trend_tables(found, 4):
            console.print(item)
    return said.get()


def test_pieces_of_a_period_are_weighted_by_rounds_and_gaps_stay_gaps() -> None:
    found = made([], buckets=100)
    line = chunks(found, "math", 10)
    assert line[:4] == [2.0, None, None, None]
    assert line[-1] == (9 * 20 + 50) / 100
    assert spark(line, 1.0, 5.0)[:5] == "▃···▃"


def test_domains_and_events_are_tables() -> None:
    events = [
        {"at": START, "kind": "drift", "domain": "math", "direction": "drop", "before": 0.5, "after": 0.25},
        {"at": START + 1, "kind": "promoted", "version": 7, "gain": {"mean": 0.1, "low": 0.05, "high": 0.2}},
        {"at": START + 2, "kind": "rolled_back", "version": 8, "reason": "acceptance fell"},
        *({"at": START + 3 + i, "kind": "rejected", "reason": f"no gain {i}"} for i in range(30)),
    ]
    text = printed(made(events))
    assert "trends since 2h" in text
    assert "30 rejected" in text
    assert "math drop 50% to 25%" in text
    assert "version 7, gain +10.0% [+5.0%, +20.0%]" in text
    assert "version 8, acceptance fell" in text
    assert "no gain 29" in text
    assert "no gain 21" not in text


def test_a_store_that_is_away_is_said() -> None:
    assert "redis is gone" in printed({**made([]), "error": "redis is gone"})


def test_the_status_speaks_of_the_series_only_where_something_is_wrong() -> None:
    fine = {"on": True, "waiting": 3, "written": 5, "lost": 0, "events_lost": 0, "error": None}
    assert _series_row(fine) == {}
    assert _series_row({**fine, "lost": 4}) == {"trends": "3 requests wait, 4 lost"}
    assert "gone" in _series_row({**fine, "error": "gone"})["trends"]
