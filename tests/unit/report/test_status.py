"""Rows of `adaptd status` on what live traffic says of versions, and on several servers."""

import asyncio
import io
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from adaptd.report.status import _captured, _watch_row, render, server_rows
from tests import samples

WATCH: dict[str, Any] = {
    "on": True,
    "watching": [4, 5],
    "before": 3,
    "requests": 120,
    "max_requests": 400,
    "accepted": 0.512,
    "expected": 0.5,
    "promised_gain": 0.031,
    "promise": "open",
    "confirmed": 2,
    "rolled_back": 1,
    "quarantined": {"2": "acceptance fell"},
    "quarantine_error": None,
}


def test_the_watch_says_what_is_compared_promised_and_refused() -> None:
    row = _watch_row(WATCH)
    assert "version 4, 5 against version 3: 120 of 400 requests, 51.2% accepted, 50.0% expected" in row
    assert "promise of +3.1% is open" in row
    assert "quarantined[/]: 2" in row
    assert "gate.watch is false" in _watch_row({**WATCH, "on": False})
    idle = {**WATCH, "watching": [], "promise": "none", "quarantined": {}}
    assert _watch_row(idle) == "nothing unconfirmed; confirmed 2, rolled back 1"
    first = {**WATCH, "before": 0, "requests": 0, "accepted": None, "expected": None}
    assert "against day 0: 0 of 400 requests;" in _watch_row(first)


def test_a_watch_whose_requests_cannot_be_compared_says_so_without_figures() -> None:
    assert "120 of 400 requests, - accepted" in _watch_row({**WATCH, "accepted": None, "expected": None})


def test_each_of_several_servers_has_a_row() -> None:
    up = {"up": True, "left_out": None, "error": "", "version": "0.32.0", "draft_version": 3, "in_flight": 2}
    servers = [
        {**up, "url": "http://a"},
        {**up, "url": "http://b", "left_out": "it differs"},
        {**up, "url": "http://c", "up": False, "error": "ConnectError"},
    ]
    rows = server_rows({"servers": servers, "canary": "http://a"})
    assert rows == {
        "server 1": "http://a, takes new drafts first; vLLM 0.32.0, draft version 3, 2 in flight",
        "server 2": "http://b; [red]left out[/]: it differs",
        "server 3": "http://c; [red]down[/]: ConnectError",
    }
    assert server_rows({"servers": servers[:1], "canary": None}) == {}


def test_the_share_of_captured_requests_is_told_with_what_bounds_it() -> None:
    capture = {"in_force": 0.12, "bound_by": "over the budget", "cost": 0.143, "limit": 1.0, "budget": 0.02}
    assert _captured(capture) == (
        "12% of the requests captured (over the budget); it slows requests by 14.3% while it is on, "
        "2% over time are allowed"
    )
    assert "100% of the requests captured; it" in _captured({**capture, "in_force": 1.0, "bound_by": None})
    assert _captured({**capture, "in_force": None}) == "the requests captured"


def test_chosen_draft_lengths_stand_beside_what_speculation_is_worth(tmp_path: Path) -> None:
    now = time.time()
    shown = {}
    for name, make in (("fixed", samples.native), ("auto", samples.choosing)):
        console = Console(file=io.StringIO(), width=240)
        console.print(render(asyncio.run(make(tmp_path / name, now).status())))
        shown[name] = console.file.getvalue()  # type: ignore[attr-defined]
    assert f"k up to {samples.K}" in shown["auto"]
    assert "k math 0, medical 3.5" in shown["auto"]
    assert f"k = {samples.K}" in shown["fixed"]
    assert "k math" not in shown["fixed"]
