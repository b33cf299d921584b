"""The learner on replayed traces: the same learner, mixture, gate and store as online; every trace is evaluated first."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from adaptd.actors.parts import learner_cycle, serving_rule
from adaptd.app.replay.models import ReplayModels
from adaptd.bench.branches import BranchScorer, build_scorer
from adaptd.bench.learners import LearnerSpec
from adaptd.bench.learners import build as build_learner
from adaptd.bench.verify import verify
from adaptd.config import Config
from adaptd.decoding.build import build_recall
from adaptd.learning.cycle import TickReport
from adaptd.learning.evaluate import profiles
from buffers.table import ReplayTable
from buffers.trace import Trace
from checkpoints.store import CURRENT, CheckpointStore
from policies.acceptance import Profile

#: Ticks after the last trace, at most: the log is over, and what it taught may be learned to its end.
_SETTLE = 24
#: Of those, so many since the last promotion that get no further than the best refused one end it.
_IDLE = 2
#: Traces that the oracle learns from, at most: it holds them in memory.
_ORACLE_TRACES = 4096

Version = tuple[Mapping[str, Tensor], tuple[str, ...]]
"""Tensors (empty: day 0), and the domains that day 0 serves beside them."""


class Rehearsal:
    """Evaluates, inserts, ticks.

    Args:
      home: folder of checkpoints and learner.
      start: folder with a copy of the checkpoints as they were before the first trace; see `copy_current`.
      table: where traces go.
    """

    def __init__(
        self,
        config: Config,
        models: ReplayModels,
        table: ReplayTable,
        home: Path,
        start: Path,
        rng: np.random.Generator,
    ) -> None:
        self._config, self._models, self._table, self._rng = config, models, table, rng
        self._rule = serving_rule(config)
        self._store = CheckpointStore(home / "checkpoints")
        self.cycle = learner_cycle(config, models.learning, models.identity, table, home, rng)
        self.before_version, self.before = _current(CheckpointStore(start))
        self.version, self.after = _current(self._store)
        self.promoted = 0
        self._held: set[str] = set()
        self._scorer: BranchScorer | None = None
        if models.target is not None:
            self._scorer = build_scorer(
                config,
                models.target,
                models.draft.model,
                np.random.default_rng([config.seed, 0xB4A]),
                wanted=lambda trace: not trace.reserved and trace.request_id not in self._held,
                rule=self._rule,
            )

    def observe(self, traces: Sequence[Trace], held: Sequence[bool]) -> Iterator[tuple[Trace, Profile, Profile]]:
        """Each trace as serving it now would have left it, with what it would have cost the first and the present draft.

        Afterwards those that are not held out are in the table, and if a tick is due it has been taken.
        """
        if not traces:
            return
        first = self.profiles(traces, self.before)
        self._stand(self.after)
        self._held = {t.request_id for t, out in zip(traces, held, strict=True) if out}
        now, seen = verify(
            self._models.draft.model,
            traces,
            self._config.engine.k,
            self._rng,
            version=self.version,
            k_draft=self._config.capture.k_draft,
            rule=self._rule,
            scorer=self._scorer,
        )
        yield from zip(traces, first, now, strict=True)
        kept = [t for t, out in zip(seen, held, strict=True) if not out]
        if kept:
            self._table.insert(kept, [t.surprise for t in kept])
        if self.cycle.new_traces() >= self._config.learn.min_new_traces:
            self._tick("traces")

    def settle(self) -> Iterator[None]:
        """Ticks until nothing more is gained; an item a tick."""
        idle, best = 0, 0.0
        for _ in range(_SETTLE):
            report = self._tick("settle")
            gain = float(report.verdict["gain"]["mean"]) if report.verdict else 0.0
            if report.published is not None:
                idle, best = 0, 0.0
            elif gain > best:
                # Not sure enough yet to pass the gate; what is learned next comes on top of it.
                best = gain
            else:
                idle += 1
            yield
            if idle >= _IDLE:
                return

    def _tick(self, reason: str) -> TickReport:
        report = self.cycle.tick(reason, self._config.checkpoints.keep)
        if report.published is not None:
            self.version, self.after = _current(self._store)
            self.promoted += 1
        return report

    def _stand(self, version: Version) -> None:
        tensors, on_base = version
        self._models.draft.load(tensors)
        self._models.draft.keep_on_base(on_base)

    def profiles(self, traces: Sequence[Trace], version: Version, k: int | None = None) -> list[Profile]:
        """What decoding these answers would cost with a version."""
        self._stand(version)
        return profiles(
            self._models.draft.model,
            traces,
            k or self._config.engine.k,
            max_tokens=max(len(t.tokens) for t in traces),
            batch_traces=self._models.chunk,
            rule=self._rule,
        )

    def recalled(self, traces: Sequence[Trace], version: Version) -> list[Profile]:
        """The same with a decoder's recall, empty at first, as when serving begins."""
        self._stand(version)
        recall = build_recall(self._config, next(self._models.draft.model.parameters()).device)
        rng, found = np.random.default_rng(self._config.seed), []
        for start in range(0, len(traces), self._models.chunk):
            chunk = traces[start : start + self._models.chunk]
            found += verify(
                self._models.draft.model, chunk, self._config.engine.k, rng, version=self.version, recall=recall
            )[0]
        return found

    def oracle(self, traces: Sequence[Trace]) -> tuple[int, list[Profile]]:
        """A draft that learned from everything in the table at will, without gate or order: how many traces, and its costs."""
        samples = [*self._table.all("recent", _ORACLE_TRACES), *self._table.all("anchors", _ORACLE_TRACES)]
        known = [trace for _, trace in sorted({s.info.key: s.trace for s in samples}.items())][-_ORACLE_TRACES:]
        learner = build_learner(LearnerSpec(name="oracle", kind="oracle"), self._config, self._config.seed)
        learner.prepare(known)
        found = profiles(
            learner.model,
            traces,
            self._config.engine.k,
            max_tokens=max(len(t.tokens) for t in traces),
            batch_traces=self._models.chunk,
            rule=self._rule,
        )
        return len(known), found


def _current(store: CheckpointStore) -> tuple[int, Version]:
    version = store.current() or 0
    if version == 0:
        return 0, ({}, ())
    manifest, tensors = store.load(version)
    return version, (tensors, tuple(manifest.gate.get("on_base", ())))


def copy_current(source: Path, target: Path) -> None:
    """Copy the live version, if there is one, to another store's folder: a replay's first version may be pruned from its own."""
    target.mkdir(parents=True, exist_ok=True)
    version = CheckpointStore(source).current()
    if version:
        name = (source / CURRENT).read_text(encoding="ascii").strip()
        shutil.copytree(source / name, target / name)
        shutil.copy(source / CURRENT, target / CURRENT)
