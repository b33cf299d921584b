"""What a replay found, for people: progress while it runs, a table, a figure and a self-contained page."""

from __future__ import annotations

import html
import time
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from adaptd.report.charts import write_page
from adaptd.report.tables import number, percent

#: Domains of the table and the figure, most records first; the others are there in the result file.
_MOST_DOMAINS = 12


class Rate(ProgressColumn):
    """Units a second, in the task's own unit; bytes in MB."""

    def render(self, task: Task) -> Text:
        """The cell."""
        speed = task.finished_speed or task.speed
        if not speed:
            return Text("")
        unit = str(task.fields.get("unit", ""))
        return Text(
            f"{decimal(int(speed))}/s" if unit == "B" else f"{speed:,.1f} {unit}/s", style="progress.data.speed"
        )


class Amount(MofNCompleteColumn):
    """How much of how much; bytes in MB."""

    def render(self, task: Task) -> Text:
        """The cell."""
        if task.fields.get("unit") != "B":
            return super().render(task)
        return Text(f"{decimal(int(task.completed))} of {decimal(int(task.total or 0))}")


def progress_columns() -> list[ProgressColumn]:
    """Columns of the progress bar: rate and time left are among them."""
    return [
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        Amount(),
        Rate(),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
    ]


def interval(value: dict[str, Any] | None) -> str:
    """A mean with its interval, as far as they are known."""
    if value is None or value["mean"] is None:
        return "-"
    return f"{value['mean']:.2f}" + ("" if value["low"] is None else f" [{value['low']:.2f}, {value['high']:.2f}]")


def signed(value: dict[str, Any] | None) -> str:
    """A relative gain with its interval."""
    if value is None or value["mean"] is None:
        return "-"
    return f"{value['mean']:+.1%}" + ("" if value["low"] is None else f" [{value['low']:+.1%}, {value['high']:+.1%}]")


def replay_table(found: dict[str, Any]) -> list[Any]:
    """The result as it is printed."""
    title = "what adaptd would give (dry run)" if found["dry_run"] else "what replay gave"
    table = Table(title=f"{title}: mean acceptance length, k = {found['k']}; on {found['measured_on']}")
    for column in ("domain", "records", "before", "after", "gain"):
        table.add_column(column, justify="left" if column == "domain" else "right")
    for name, row in _domains(found):
        table.add_row(
            name or "unlabelled",
            str(row["records"]),
            interval(row["mal_before"]),
            interval(row["mal_after"]),
            signed(row["gain"]),
        )
    table.add_row("all", "", interval(found["mal_before"]), interval(found["mal_after"]), signed(found["gain"]))
    return [table, *lines(found)]


def _domains(found: dict[str, Any]) -> list[tuple[str, Any]]:
    rows = sorted(found["by_domain"].items(), key=lambda item: -item[1]["records"])
    return rows[:_MOST_DOMAINS] if len(rows) > 1 or (rows and rows[0][0]) else []


def lines(found: dict[str, Any]) -> list[str]:
    """The rest of the result, a sentence a line."""
    text = [
        f"{found['records']:,} records replayed; draft version {found['versions']['before']} -> {found['versions']['after']}"
    ]
    for decided, n in found["teacher"]["decided"].items():
        text.append(f"teacher {decided}: {n:,} records")
    if found["teacher"]["why_no_target"]:
        text.append(
            f"no target at hand ({found['teacher']['why_no_target']}): hard labels; at a temperature MAL is a lower bound"
        )
    if (agreement := found["teacher"]["greedy_agreement"]) is not None:
        text.append(f"of greedily decoded answers {agreement:.1%} of the tokens are this target's first choice")
    for reason, n in found["refused"].items():
        first = found["refused_first"].get(reason)
        text.append(f"not used: {n:,} {reason}" + (f" (first: {first})" if first else ""))
    if recall := found["with_recall"]:
        text.append(f"with recall, empty at first: {interval(recall['mal_before'])} -> {interval(recall['mal_after'])}")
    if oracle := found["oracle"]:
        text.append(
            f"offline oracle on {oracle['traces']:,} traces: {interval(oracle['mal'])}; reached "
            f"{percent(oracle['share_of_oracle'])} of its MAL, {percent(oracle['share_of_gain'])} of its gain"
        )
    if found["recommended_k"] is not None:
        speed = found["speedup"]
        text.append(
            f"recommended k: {found['recommended_k']} (expected speed-up {number(speed['recommended'])}; k = {found['k']}: "
            f"{number(speed['configured'])}), at the costs measured here, one request at a time"
        )
    text.append(f"peak memory {found['peak_rss_bytes'] / 2**20:,.0f} MiB in {found['seconds']:,.0f} s")
    return text


def replay_figure(found: dict[str, Any], path: Path) -> None:
    """MAL over time of each record before it was learned from, and by domain before and after."""
    bins, domains = found["prequential"]["by_time"], _domains(found)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", width_ratios=(3, 2))
    at, done = [], 0
    for row in bins:
        done += row["records"]
        at.append(done)
    for key, label, color in (
        ("mal_before", "draft as it was", "#888888"),
        ("mal_during", "draft that learns", "#1f77b4"),
    ):
        left.plot(at, [row[key]["mean"] for row in bins], "o-", markersize=3, color=color, label=label)
        known = [(x, row[key]) for x, row in zip(at, bins, strict=True) if row[key]["low"] is not None]
        left.fill_between(
            [x for x, _ in known], [v["low"] for _, v in known], [v["high"] for _, v in known], color=color, alpha=0.15
        )
    left.set(
        xlabel="records, in order of time", ylabel="mean acceptance length", title="before each record was learned from"
    )
    left.legend()
    rows = [*((name or "unlabelled", row) for name, row in domains), ("all", found)]
    for offset, key, color in ((-0.2, "mal_before", "#888888"), (0.2, "mal_after", "#1f77b4")):
        means = [row[key]["mean"] or 0.0 for _, row in rows]
        right.barh([i + offset for i in range(len(rows))], means, height=0.38, color=color)
        for i, (_, row) in enumerate(rows):
            if row[key]["low"] is not None:
                right.plot([row[key]["low"], row[key]["high"]], [i + offset] * 2, color="black", linewidth=1)
    right.set_yticks(range(len(rows)), [name for name, _ in rows])
    right.invert_yaxis()
    right.set(xlabel="mean acceptance length", title=f"before (grey) and after, {found['measured_on']}")
    right.title.set_fontsize(9)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def replay_report(found: dict[str, Any], folder: Path) -> list[Path]:
    """Write `replay.png` and the self-contained `replay.html`; returns their paths."""
    image, page = folder / "replay.png", folder / "replay.html"
    replay_figure(found, image)
    domains = "".join(
        f"<tr><td>{html.escape(name or 'unlabelled')}</td><td>{row['records']}</td><td>{interval(row['mal_before'])}</td>"
        f"<td>{interval(row['mal_after'])}</td><td>{signed(row['gain'])}</td></tr>"
        for name, row in [
            *_domains(found),
            ("all", {"records": "", **{k: found[k] for k in ("mal_before", "mal_after", "gain")}}),
        ]
    )
    times = "".join(
        f"<tr><td>{_day(row['until'])}</td><td>{row['records']}</td><td>{interval(row['mal_before'])}</td>"
        f"<td>{interval(row['mal_during'])}</td></tr>"
        for row in found["prequential"]["by_time"]
    )
    said = "".join(f"<li>{html.escape(line)}</li>" for line in lines(found))
    title = "adaptd replay: what adaptd would give" if found["dry_run"] else "adaptd replay"
    write_page(
        page,
        title,
        f"<p>Mean acceptance length (emitted tokens per verification round, bonus included) at k = {found['k']}, with 95 % "
        f"intervals, on {html.escape(found['measured_on'])}. Interval of the mean over such traffic, by resampling whole "
        "records.</p>",
        image,
        f"<h2>By domain</h2><table><tr><th>domain</th><th>records</th><th>before</th><th>after</th><th>gain</th></tr>"
        f"{domains}</table><ul>{said}</ul><h2>By time</h2><p>Each record was evaluated before it was learned from.</p>"
        f"<table><tr><th>until</th><th>records</th><th>draft as it was</th><th>draft that learns</th></tr>{times}</table>",
    )
    return [image, page]


def _day(at: float | None) -> str:
    return "-" if at is None else time.strftime("%Y-%m-%d %H:%M", time.gmtime(at))
