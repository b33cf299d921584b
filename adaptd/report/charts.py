"""The demonstration's figure and page: MAL over requests, adapting and frozen, with phases and swaps marked."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

#: Requests of a point of a curve.
SMOOTH = 40


class ServedLike(Protocol):
    """What the figure reads of an answered request."""

    phase: int
    emitted: int
    rounds: int
    frozen_rounds: float | None
    at: float


class PhaseLike(Protocol):
    """What the figure reads of a phase."""

    @property
    def domain(self) -> str:
        """Its traffic."""


def rolling(emitted: FloatArray, rounds: FloatArray) -> FloatArray:
    """Ratio of sums over the last `SMOOTH` requests."""

    def windowed(values: FloatArray) -> FloatArray:
        total = np.concatenate([[0.0], np.cumsum(values)])
        first = np.maximum(0, np.arange(1, len(values) + 1) - SMOOTH)
        sums: FloatArray = total[1:] - total[first]
        return sums

    ratio: FloatArray = windowed(emitted) / windowed(rounds)
    return ratio


def demo_figure(
    served: Sequence[ServedLike], phases: Sequence[PhaseLike], events: Sequence[dict[str, Any]], path: Path
) -> None:
    """Write the figure as PNG. Requests whose trace was lost have no frozen score and are left out of both lines."""
    known = [s for s in served if s.frozen_rounds]
    emitted = np.array([s.emitted for s in known], float)
    figure, axes = plt.subplots(figsize=(10, 4.5), layout="constrained")
    axes.plot(rolling(emitted, np.array([s.rounds for s in known], float)), color="#1f77b4", label="adapting")
    axes.plot(rolling(emitted, np.array([s.frozen_rounds for s in known], float)), color="#888888", label="frozen")
    for index, phase in enumerate(phases):
        at = next((i for i, s in enumerate(known) if s.phase == index), None)
        if at is not None:
            axes.axvline(at, color="#444444", linewidth=0.8, linestyle="--")
            axes.annotate(
                phase.domain, (at, 1), xycoords=("data", "axes fraction"), xytext=(4, -12), textcoords="offset points"
            )
    times = np.array([s.at for s in known])
    marks = {
        "promoted": ("^", "#2ca02c", "swap"),
        "drift": ("x", "#d62728", "drift detected"),
        "rollback": ("v", "#ff7f0e", "rollback"),
    }
    low = axes.get_ylim()[0]
    for kind, (marker, color, label) in marks.items():
        at_request = [int(np.searchsorted(times, e["at"])) for e in events if e["kind"] == kind]
        if at_request:
            axes.scatter(
                at_request, [low] * len(at_request), marker=marker, color=color, label=label, zorder=3, clip_on=False
            )
    axes.set_xlabel("request")
    axes.set_ylabel(f"mean acceptance length (last {SMOOTH} requests)")
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)
    plt.close(figure)


_PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body{{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}}
table{{border-collapse:collapse}}td,th{{padding:.3rem .8rem;border-bottom:1px solid #ddd;text-align:right}}
td:first-child,th:first-child{{text-align:left}}img{{max-width:100%}}.wide{{overflow-x:auto}}pre{{overflow-x:auto}}</style></head><body>
<h1>{title}</h1>{text}
{image}
{body}</body></html>
"""


def write_page(path: Path, title: str, text: str, image: Path, body: str) -> None:
    """A self-contained page around a PNG; `text` and `body` are HTML, `title` is not."""
    shown = embedded(image, "mean acceptance length over requests")
    path.write_text(_PAGE.format(title=html.escape(title), text=text, image=shown, body=body), encoding="utf-8")


def embedded(image: Path, alt: str) -> str:
    """A PNG as HTML that holds it."""
    encoded = base64.b64encode(image.read_bytes()).decode()
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{encoded}">'


def demo_report(
    result: dict[str, Any], served: Sequence[ServedLike], phases: Sequence[PhaseLike], folder: Path
) -> list[Path]:
    """Write `demo.png` and the self-contained `demo.html`; returns their paths."""
    image, page = folder / "demo.png", folder / "demo.html"
    demo_figure(served, phases, result["events"], image)
    rows = "".join(
        f"<tr><td>{html.escape(r['domain'])}</td><td>{r['requests']}</td>"
        + "".join(
            f"<td>{r[who][when]:.2f}</td>" if r[who][when] is not None else "<td>-</td>"
            for when in ("first_100_mal", "last_100_mal")
            for who in ("frozen", "adapting")
        )
        + "</tr>"
        for r in result["phases"]
    )
    events = "".join(
        f"<tr><td>{html.escape(e['kind'])}</td><td>"
        + html.escape(", ".join(f"{k} {v}" for k, v in e.items() if k not in ("at", "kind")))
        + "</td></tr>"
        for e in result["events"]
    )
    heads = ("phase", "requests", "frozen, first 100", "adapting, first 100", "frozen, last 100", "adapting, last 100")
    write_page(
        page,
        "adaptd demonstration",
        "<p>Mean acceptance length (emitted tokens per verification round, bonus included) of the adapting draft, counted "
        "while decoding, and of the frozen draft on the same answers.</p>",
        image,
        f"<h2>By phase</h2><table><tr>{''.join(f'<th>{head}</th>' for head in heads)}</tr>{rows}</table>"
        f"<h2>Events</h2><table><tr><th>event</th><th>details</th></tr>{events}</table>",
    )
    return [image, page]
