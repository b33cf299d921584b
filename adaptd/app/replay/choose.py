"""Spending a budget: every record gets a score, the highest are replayed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

from rich.progress import Progress

from adaptd.app.replay.lessons import Lessons
from adaptd.app.replay.models import ReplayModels
from adaptd.config import Config
from adaptd.errors import ConfigError
from adaptd.ingest.select import REFERENCE, Selection, fit_reference, shifts, surprises
from adaptd.ingest.spool import Queued, Spool
from buffers.table import ReplayTable
from buffers.trace import Trace
from policies.shift import RepresentationShift

#: Anchors below which the log itself is the reference.
_LEAST_ANCHORS = 64


def spend_budget(
    config: Config,
    models: ReplayModels,
    lessons: Lessons,
    spool: Spool,
    table: ReplayTable,
    budget: int,
    by: Selection,
    held: Callable[[Queued], bool],
    progress: Progress,
) -> None:
    """Keep the `budget` records with the highest score to learn from; a uniform sample for `random`.

    Records that are held out stay, whatever their score: figures are of the traffic, not of the choice.

    Raises:
      ConfigError: a representation shift without a target.
    """
    if by == "shift" and models.target is None:
        raise ConfigError(
            "--select shift reads the target's hidden states, and there is no target: take surprise or random"
        )
    reference = _reference(models, lessons, spool, table) if by == "shift" else None
    task = progress.add_task("selecting", total=spool.count(), unit="records")
    kept = 0
    for batch in spool.walk(0, models.chunk):
        spared = [q for q in batch if held(q)]
        kept += len(spared)
        spool.score((q.seq, math.inf) for q in spared)
        others = [q for q in batch if not held(q)]
        if by == "random":
            spool.score((q.seq, float(int.from_bytes(q.digest[:6], "big"))) for q in others)
        elif scored := lessons.provisional(others):
            values = _scores(config, models, reference, scored)
            spool.score((q.seq, value) for (q, _), value in zip(scored, values, strict=True))
        progress.update(task, completed=batch[-1].rank + 1)
    progress.remove_task(task)
    spool.keep_lowest(kept + budget, "left out by --budget", by="score")


def _scores(
    config: Config, models: ReplayModels, reference: RepresentationShift | None, scored: list[tuple[Queued, Trace]]
) -> list[float]:
    traces = [trace for _, trace in scored]
    if reference is not None and models.target is not None:
        return shifts(models.target, reference, traces)
    mode: Literal["agreement", "surprise"] = "agreement" if config.learn.priority == "agreement" else "surprise"
    return surprises(models.draft.model, traces, mode, config.learn.tau)


def _reference(models: ReplayModels, lessons: Lessons, spool: Spool, table: ReplayTable) -> RepresentationShift:
    """The deployment's anchors, a uniform sample of all that it served; without enough of them, one of the log."""
    assert models.target is not None
    anchors = [s.trace for s in table.all("anchors", REFERENCE)]
    if len(anchors) < _LEAST_ANCHORS:
        step = max(1, spool.count() // REFERENCE)
        anchors = []
        for batch in spool.walk(0, 256):
            anchors += [t for q, t in lessons.provisional([q for q in batch if q.rank % step == 0])]
            if len(anchors) >= REFERENCE:
                break
    return fit_reference(models.target, anchors[:REFERENCE])
