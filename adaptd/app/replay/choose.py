"""Spending a budget: every record has a chance that follows its score."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

from rich.progress import Progress

from adaptd.app.replay.lessons import Lessons, request_id
from adaptd.app.replay.models import ReplayModels
from adaptd.config import Config
from adaptd.errors import ConfigError
from adaptd.ingest.select import REFERENCE, Selection, fit_reference, shifts, surprises
from adaptd.ingest.spool import Queued, Spool
from buffers.table import ReplayTable
from buffers.trace import Trace, is_reserved
from policies.shift import RepresentationShift

#: Anchors below which the log itself is the reference.
_LEAST_ANCHORS = 64
#: Of a chance; nothing is left out for certain.
_LEAST_SCORE = 1e-6


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
    """Keep `budget` records to learn from, each with a chance in proportion to its score; a uniform sample for `random`.

    Drawn, and not the highest of all: those are often of one kind, and a draft that never saw the other kinds again
    forgets them. Records that the gate will judge on are drawn uniformly, and those that are held out all stay: what
    is judged and measured is the traffic, not the choice.

    Raises:
      ConfigError: a representation shift without a target.
    """
    if by == "shift" and models.target is None:
        raise ConfigError(
            "--select shift reads the target's hidden states, and there is no target: take surprise or random"
        )
    reference = _reference(models, lessons, spool, table) if by == "shift" else None
    task = progress.add_task("selecting", total=spool.count(), unit="records")
    kept = sum(held(q) for batch in spool.walk(0, models.chunk) for q in batch)
    share = min(1.0, budget / max(1, spool.count() - kept))
    for batch in spool.walk(0, models.chunk):
        spool.score((q.seq, math.inf) for q in batch if held(q))
        others = [q for q in batch if not held(q)]
        if by == "random":
            spool.score((q.seq, _lot(q)) for q in others)
        else:
            judges = [q for q in others if is_reserved(request_id(q), config.capture.reserved_share)]
            spool.score((q.seq, math.inf if _lot(q) < share else -math.inf) for q in judges)
            reserved = {q.seq for q in judges}
            if scored := lessons.provisional([q for q in others if q.seq not in reserved]):
                values = _scores(config, models, reference, scored)
                spool.score((q.seq, _drawn(q, value)) for (q, _), value in zip(scored, values, strict=True))
        progress.update(task, completed=batch[-1].rank + 1)
    progress.remove_task(task)
    spool.keep_lowest(kept + budget, "left out by --budget", by="score")


def _lot(queued: Queued) -> float:
    """Within (0, 1), the same for the same record."""
    return (int.from_bytes(queued.digest[:6], "big") + 0.5) / 2**48


def _drawn(queued: Queued, score: float) -> float:
    """A key whose highest are a sample without replacement, with chances in proportion to scores.

    Source: Efraimidis and Spirakis 2006, algorithm A-ES: u^(1 / weight), here its logarithm.
    """
    return math.log(_lot(queued)) / max(score, _LEAST_SCORE)


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
