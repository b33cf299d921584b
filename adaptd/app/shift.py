"""`adaptd bench shift` from names to files: read the specifications, run them, write table, figures and result."""

from __future__ import annotations

import dataclasses
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from adaptd.bench import shift
from adaptd.bench.learners import LearnerSpec
from adaptd.bench.run import Run, RunLog
from adaptd.bench.stream import Stream, read_spec
from adaptd.config import Config
from adaptd.pocket.shipped import pocket_prompts
from adaptd.report.shift import figure, markdown

#: The tuning stream's seed is far from those that are reported.
_TUNING_SEED = 10_000
_DOMAINS = ("medical", "math", "tools", "code")


def run(
    config: Config,
    *,
    streams: Sequence[str],
    learners: Sequence[str],
    seeds: int,
    scale: float,
    temperature: float | None,
    settle: int,
    tune: bool,
    jobs: int,
    report: Path,
    runs: Path | None = None,
) -> dict[str, Any]:
    """Run and report; the result in the form of design section 4 (`bench shift`), with every request.

    Args:
      runs: file of finished runs, from which an interrupted benchmark goes on.
    """
    wanted = [read_spec(Stream, "streams", name).scaled(scale) for name in streams]
    if temperature is not None:
        wanted = [stream.at(temperature) for stream in wanted]
    specs = [read_spec(LearnerSpec, "learners", name) for name in learners]
    for spec in specs:
        spec.require(config)
    numbers = [config.seed + i for i in range(seeds)]
    if tune:
        specs = [variant for spec in specs for variant in map(spec.with_rate, spec.rates)]
        numbers = [_TUNING_SEED]
    prompts = {d: pocket_prompts(d) for d in _DOMAINS}
    console = Console()
    for stream in wanted:
        length, kept = sum(p.requests for p in stream.phases), sum(stream.pool().values())
        console.print(
            f"{stream.name}: {length} requests at temperature {stream.temperature:g}, {kept} answers in the pool"
        )
    total = len(wanted) * len(numbers) * sum(len(shift.variants(s)) for s in specs)
    known = RunLog(runs) if runs is not None else None
    sweep = shift.sweep(config, prompts, wanted, specs, numbers, jobs, known)
    found_runs = list(track(sweep, "learners", total, console=console))
    if tune:
        return {"temperature": {s.name: s.temperature for s in wanted}, "tuning": _rates(found_runs, console)}
    best = {stream.name: [r for r in shift.best_of(found_runs) if r.stream == stream.name] for stream in wanted}
    found = {stream.name: shift.summarise(stream, best[stream.name], settle) for stream in wanted}
    report.mkdir(parents=True, exist_ok=True)
    tables = [markdown(name, summary) for name, summary in found.items()]
    console.print("\n".join(tables), soft_wrap=True, markup=False, highlight=False)
    table = report / "shift.md"
    table.write_text("\n".join(tables), encoding="utf-8")
    files = [table]
    for name, summary in found.items():
        files += figure(name, summary, best[name], report)
    for path in files:
        console.print(f"wrote {path}")
    return {"streams": found, "runs": [dataclasses.asdict(r) for part in best.values() for r in part]}


def _rates(runs: Sequence[Run], console: Console) -> dict[str, dict[str, float]]:
    """MAL over the whole stream by learner and rate."""
    mals: defaultdict[tuple[str, float], list[float]] = defaultdict(list)
    for r in runs:
        mals[r.learner, r.lr or 0.0].append(r.curve.mal(0, len(r.rounds)))
    found: dict[str, dict[str, float]] = {}
    for (name, rate), values in sorted(mals.items()):
        found.setdefault(name, {})[f"{rate:g}"] = statistics.fmean(values)
    for name, by_rate in found.items():
        best = max(by_rate, key=by_rate.__getitem__)
        listed = ", ".join(f"{lr}: {value:.3f}" for lr, value in by_rate.items())
        console.print(f"{name}: best {best} (MAL by rate: {listed})")
    return found
