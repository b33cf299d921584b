"""Trends as rich tables: `adaptd status --since`."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.console import RenderableType
from rich.table import Table

from adaptd.report.tables import gain, number, percent, spark

#: Characters of a sparkline; events shown of each kind.
_WIDTH, _EVENTS = 48, 8


def trend_tables(trends: dict[str, Any], k: int) -> list[RenderableType]:
    """Acceptance by domain, what was rejected, and events."""
    if error := trends.get("error"):
        return [f"[red]trends unavailable[/]: {error}"]
    return [_domains(trends, k), *_rejections(trends), *_events(trends)]


def when(at: float, step_s: float) -> str:
    """Local time, with the day where buckets are long."""
    return time.strftime("%H:%M:%S" if step_s <= 60 else "%m-%d %H:%M", time.localtime(at))


def bucket(step_s: float) -> str:
    """The length of a bucket."""
    return f"{step_s // 60} min" if step_s < 3600 else f"{step_s // 3600} h"


def entropy_bin(values: dict[str, Any]) -> str:
    """A bin of the target's entropy."""
    return f"{values['from']:g}+" if values["to"] is None else f"{values['from']:g} to {values['to']:g}"


def chunks(trends: dict[str, Any], name: str, width: int = _WIDTH) -> list[float | None]:
    """MAL of a domain in at most `width` pieces of the period; None where nothing was served.

    Buckets are weighted by rounds, which are tokens / MAL.
    """
    line = trends["domains"][name]
    n = max(1, -(-len(trends["at"]) // width))
    found: list[float | None] = []
    for start in range(0, len(trends["at"]), n):
        tokens = line["tokens"][start : start + n]
        rounds = sum(t / mal for t, mal in zip(tokens, line["mal"][start : start + n], strict=True) if mal)
        found.append(sum(tokens) / rounds if rounds else None)
    return found


def _ends(values: Sequence[float | None]) -> str:
    known = [v for v in values if v is not None]
    return f"{known[0]:.2f} -> {known[-1]:.2f}" if known else "-"


def _domains(trends: dict[str, Any], k: int) -> Table:
    first, last = when(trends["from"], 900), when(trends["to"], 900)
    size = bucket(trends["step_s"])
    table = Table(title=f"trends since {trends['since']} ({first} to {last}, buckets of {size})", expand=True)
    for column in ("domain", "requests", "MAL", "first -> last", "accepted", "by depth", "MAL over time"):
        left = column in ("domain", "MAL over time")
        table.add_column(column, justify="left" if left else "right", no_wrap=True)
    for name, row in trends["summary"].items():
        line = chunks(trends, name)
        table.add_row(
            name,
            f"{row['requests']:,}",
            number(row["mal"]),
            _ends(line),
            percent(row["token_acceptance"]),
            " ".join(f"{d['acceptance']:.0%}" for d in row["by_depth"]),
            spark(line, 1.0, max([v for v in line if v is not None] + [1.0 + k / 2])),
        )
    return table


def _rejections(trends: dict[str, Any]) -> list[Table]:
    """By target entropy and by token group, of the traces that were looked at."""
    row = trends["summary"].get("all")
    if row is None or (not any(b["judged"] for b in row["by_entropy"]) and not row["by_group"]):
        return []
    table = Table(title="of the traces looked at", expand=True)
    table.add_column("target entropy, nats")
    table.add_column("accepted", justify="right")
    table.add_column("token group")
    table.add_column("rejected", justify="right")
    table.add_column("of", justify="right")
    bins = [(entropy_bin(b), percent(b["acceptance"])) for b in row["by_entropy"]]
    groups = [(name, percent(g["rate"]), f"{g['judged']:,}") for name, g in row["by_group"].items() if g["judged"]]
    for i in range(max(len(bins), len(groups))):
        table.add_row(*(bins[i] if i < len(bins) else ("", "")), *(groups[i] if i < len(groups) else ("", "", "")))
    return [table]


def details(event: dict[str, Any]) -> str:
    """What an event says beside its kind and time, in a line."""
    if event["kind"] == "drift":
        return f"{event['domain']} {event['direction']} {event['before']:.0%} to {event['after']:.0%}"
    parts = [f"version {event['version']}"] if "version" in event else []
    if event.get("reason"):  # a verdict's names its gain
        parts.append(str(event["reason"]))
    elif event.get("gain"):
        parts.append(f"gain {gain(event)}")
    return ", ".join(parts)


def _events(trends: dict[str, Any]) -> list[Table]:
    events = trends["events"]
    if not events:
        return []
    counts = Counter(event["kind"] for event in events)
    said = ", ".join(f"{n} {kind.replace('_', ' ')}" for kind, n in counts.items())
    table = Table(title=f"events: {said}", expand=True)
    for column in ("when", "what", "details"):
        table.add_column(column)
    shown = [e for kind in counts for e in [e for e in events if e["kind"] == kind][-_EVENTS:]]
    for event in sorted(shown, key=lambda e: float(e["at"])):
        table.add_row(when(event["at"], trends["step_s"]), event["kind"].replace("_", " "), details(event))
    return [table]
