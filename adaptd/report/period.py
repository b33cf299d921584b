"""The figures of `adaptd report`: MAL over time, acceptance by depth and target entropy, rejections by token group."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter

from adaptd.report.charts import embedded, write_page
from adaptd.report.monitor import ALL
from adaptd.report.period_tables import body, introduction
from adaptd.report.trend_tables import chunks, entropy_bin

#: Domains drawn, most requests first; the table has them all. Points of a line.
_DOMAINS, _POINTS = 8, 72
#: Swaps up to which each has a line of its own beside its mark.
_LINES = 40
_GREY, _BLUE = "#888888", "#1f77b4"
_MARKS = {
    "promoted": ("^", "#2ca02c", "new version"),
    "rolled_back": ("v", "#ff7f0e", "rolled back"),
    "drift": ("x", "#d62728", "drift"),
}


def period_report(found: dict[str, Any], folder: Path) -> list[Path]:
    """Write `mal.png`, `acceptance.png`, `groups.png` and the self-contained `report.html`; returns their paths."""
    images = [folder / f"{name}.png" for name in ("mal", "acceptance", "groups")]
    page = folder / "report.html"
    for image, draw in zip(images, (_mal, _acceptance, _groups), strict=True):
        draw(found, image)
    mal, acceptance, groups = images
    write_page(
        page,
        f"adaptd report: {found['deployment']}",
        introduction(found),
        mal,
        body(
            found,
            embedded(acceptance, "acceptance by depth and by target entropy"),
            embedded(groups, "rejections by token group"),
        ),
    )
    return [page, *images]


def _time(at: float) -> float:
    """Unix seconds as an axis of dates counts."""
    return at / 86400.0


def _mal(found: dict[str, Any], path: Path) -> None:
    trends = found["trends"]
    figure, axes = plt.subplots(figsize=(11, 4.6), layout="constrained")
    size = max(1, -(-len(trends["at"]) // _POINTS))
    middles = [at + size * trends["step_s"] / 2 for at in trends["at"][::size]]
    shown = sorted((name for name in trends["domains"] if name != ALL), key=lambda n: -_requests(trends, n))[:_DOMAINS]
    lines = {name: chunks(trends, name, _POINTS) for name in (*shown, *([ALL] if len(shown) != 1 else []))}
    for name, line in lines.items():
        known = [(_time(at), value) for at, value in zip(middles, line, strict=True) if value is not None]
        style: dict[str, Any] = (
            {"color": "black", "linewidth": 1.0, "alpha": 0.55} if name == ALL else {"linewidth": 1.6}
        )
        axes.plot([x for x, _ in known], [y for _, y in known], "-o", markersize=3, label=name, **style)
    _parts(found, axes)
    low = axes.get_ylim()[0]
    for kind, (marker, color, label) in _MARKS.items():
        events = [event for event in trends["events"] if event["kind"] == kind and event["at"] >= trends["from"]]
        at = [_time(event["at"]) for event in events]
        heights = [_height(lines, middles, event) if kind == "drift" else None for event in events]
        y = [low if height is None else height for height in heights]
        if kind != "drift" and len(at) <= _LINES:
            for x in at:
                axes.axvline(x, color=color, linewidth=0.7, alpha=0.5)
        if at:
            size_ = 70 if kind == "drift" else 36
            axes.scatter(at, y, marker=marker, s=size_, color=color, label=label, zorder=4, clip_on=False)
    locator = AutoDateLocator(tz=UTC)  # type: ignore[no-untyped-call]
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(ConciseDateFormatter(locator, tz=UTC))  # type: ignore[no-untyped-call]
    axes.grid(axis="y", alpha=0.25)
    axes.set(ylabel="mean acceptance length", xlabel="time, UTC")
    if lines:
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    _save(figure, path)


def _requests(trends: dict[str, Any], name: str) -> int:
    return int(trends["summary"][name]["requests"])


def _parts(found: dict[str, Any], axes: Axes) -> None:
    """What is compared, shaded."""
    if found["split"] is None:
        return
    trends = found["trends"]
    for start, end, color in (
        (trends["at"][0], found["split"]["before"], _GREY),
        (found["split"]["after"], trends["to"], _BLUE),
    ):
        axes.axvspan(_time(start), _time(max(start, end)), color=color, alpha=0.09, linewidth=0)
    for at, name, side in ((trends["at"][0], "before", "left"), (trends["to"], "after", "right")):
        axes.annotate(
            name,
            (_time(at), 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 4),
            textcoords="offset points",
            ha=side,
            color="#555555",
        )


def _height(lines: dict[str, list[float | None]], middles: list[float], event: dict[str, Any]) -> float | None:
    """Where the line of the event's domain is at the time of the event; None where it is not drawn."""
    line = lines.get(event.get("domain", ""), [])
    known = [(abs(at - event["at"]), value) for at, value in zip(middles, line, strict=False) if value is not None]
    return min(known)[1] if known else None


def _sides(found: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """What is drawn side by side: name, color, metrics of all domains."""
    if found["split"] is None:
        yield "whole period", _BLUE, found["trends"]["summary"][ALL]
        return
    yield "before", _GREY, found["before"][ALL]
    yield "after", _BLUE, found["after"][ALL]


def _bars(axes: Axes, labels: list[str], series: list[tuple[str, str, list[float | None]]], upright: bool) -> None:
    """Groups of bars, one for each series, labelled with their values."""
    width = 0.8 / len(series)
    for i, (name, color, values) in enumerate(series):
        at = [j + (i - (len(series) - 1) / 2) * width for j in range(len(labels))]
        sizes = [v or 0.0 for v in values]
        bars = (
            axes.bar(at, sizes, width, color=color, label=name)
            if upright
            else axes.barh(at, sizes, width, color=color, label=name)
        )
        axes.bar_label(bars, ["-" if v is None else f"{v:.0%}" for v in values], fontsize=7, padding=2)
    (axes.set_xticks if upright else axes.set_yticks)(range(len(labels)), labels)
    axes.margins(x=None if upright else 0.1, y=0.12 if upright else None)


def _acceptance(found: dict[str, Any], path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    sides = list(_sides(found))
    depth = max((len(row["by_depth"]) for _, _, row in sides), default=0)
    depths = [
        (name, color, [d["acceptance"] for d in row["by_depth"]] + [None] * (depth - len(row["by_depth"])))
        for name, color, row in sides
    ]
    _bars(left, [str(i + 1) for i in range(depth)], depths, upright=True)
    left.set(xlabel="depth in the block", ylabel="accepted, of those reached", title="by depth")
    bins = [entropy_bin(b) for b in sides[0][2]["by_entropy"]]
    entropies = [(name, color, [b["acceptance"] for b in row["by_entropy"]]) for name, color, row in sides]
    _bars(right, bins, entropies, upright=True)
    right.set(xlabel="entropy of the target, nats", ylabel="accepted, of those judged", title="by target entropy")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    _save(figure, path)


def _groups(found: dict[str, Any], path: Path) -> None:
    sides = list(_sides(found))
    names = [
        n for n in found["trends"]["groups"] if any(row["by_group"].get(n, {}).get("judged") for _, _, row in sides)
    ]
    figure, axes = plt.subplots(figsize=(9, 0.9 + 0.55 * max(3, len(names))), layout="constrained")
    rates = [(name, color, [row["by_group"][n]["rate"] for n in names]) for name, color, row in sides]
    _bars(axes, names, rates, upright=False)
    axes.invert_yaxis()
    axes.set(xlabel="rejected, of the judged tokens of the group")
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=120)
    plt.close(figure)
