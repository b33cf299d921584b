"""The shift benchmark's table (Markdown) and figure (PNG and HTML)."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from adaptd.report.charts import SMOOTH, rolling, write_page


class RunLike(Protocol):
    """What the figure reads of a run."""

    @property
    def learner(self) -> str:
        """Name."""

    @property
    def emitted(self) -> list[float]:
        """Tokens of each request."""

    @property
    def rounds(self) -> list[float]:
        """Expected rounds of each request."""


def cell(interval: dict[str, float | None], form: str = ".2f") -> str:
    """`mean [low, high]`, as much of it as is known."""
    mean, low, high = interval["mean"], interval["low"], interval["high"]
    if mean is None:
        return "-"
    return f"{mean:{form}}" if low is None or high is None else f"{mean:{form}} [{low:{form}}, {high:{form}}]"


def markdown(name: str, found: dict[str, Any]) -> str:
    """One stream's table."""
    labels = [f"{i + 1} {p['label']}" for i, p in enumerate(found["phases"])]
    heads = ["learner", "trained", "recovery", f"after {found['settle']}", "time to 90 %", "forgetting"]
    heads += [f"final MAL {label}" for label in labels] + ["B/position", "B/token", "tokens/s", "learner s"]
    lines = [
        f"### {name}: {found['about']}",
        "",
        f"Temperature {found['temperature']:g}; phases of {', '.join(str(p['requests']) for p in found['phases'])} requests; "
        "mean and 95 % interval over seeds.",
        "",
        "| " + " | ".join(heads) + " |",
        "|" + "---|" * len(heads),
    ]
    for learner, row in found["learners"].items():
        cells = [
            learner,
            f"{row['trainable_fraction']:.1%}",
            cell(row["recovery"]),
            cell(row["recovery_settled"]),
            ", ".join(cell(t, ".0f") for t in row["time_to_90"]),
            cell(row["forgetting"], ".1%"),
            *(cell(m) for m in row["final_mal"]),
            f"{row['bytes_per_position']:.0f}",
            f"{row['bytes_per_token']:.0f}",
            cell(row["tokens_per_s"], ".0f"),
            cell(row["learner_s"], ".0f"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def figure(name: str, found: dict[str, Any], runs: Sequence[RunLike], folder: Path) -> list[Path]:
    """MAL over requests, a line a learner (mean over seeds), switches marked; the files written."""
    folder.mkdir(parents=True, exist_ok=True)
    canvas, axes = plt.subplots(figsize=(11, 5), layout="constrained")
    for learner in found["learners"]:
        lines = [rolling(np.array(r.emitted), np.array(r.rounds)) for r in runs if r.learner == learner]
        style = {"frozen": "--", "offline_oracle": ":"}.get(learner, "-")
        axes.plot(np.mean(lines, axis=0), style, label=learner, linewidth=2.5 if learner == "ours" else 1.3)
    switch = 0
    for phase in found["phases"]:
        axes.axvline(switch, color="grey", linewidth=0.8)
        axes.text(switch, 1.0, f" {phase['label']}", transform=axes.get_xaxis_transform(), va="bottom", fontsize=9)
        switch += phase["requests"]
    axes.set(xlabel="requests", ylabel=f"mean acceptance length (last {SMOOTH} requests)")
    axes.legend(ncols=2, fontsize=8)
    png = folder / f"{name}.png"
    canvas.savefig(png, dpi=130)
    plt.close(canvas)
    page = folder / f"{name}.html"
    write_page(page, f"adaptd bench shift: {name}", "", png, f"<pre>{html.escape(markdown(name, found))}</pre>")
    return [png, page]
