"""What each step of a tick learns from: fresh traces, replayed ones and anchors, in the mixture's proportions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from adaptd.config import LearnConfig
from buffers.table import NO_KEY, Key, ReplaySample, ReplayTable
from buffers.trace import Trace
from policies.selection import Mixture, Prioritized, Uniform, importance_weights, least_used

#: Traces whose uses are counted, at least; of older ones it is forgotten that they were used.
_COUNTED = 1 << 16


class Batches:
    """Draws batches from a replay table that is read once a tick.

    Which of the traces were learned from, and how often, is known to this process alone: after a restart all are new.
    """

    def __init__(self, table: ReplayTable, learn: LearnConfig, rng: np.random.Generator) -> None:
        self._table, self._learn, self._rng = table, learn, rng
        self._last_key = NO_KEY
        self.steps = 0
        """Since the mixture began."""
        self._uses: Counter[Key] = Counter()
        self._fresh: list[ReplaySample] = []
        self._selected: list[ReplaySample] = []
        self._anchors: list[ReplaySample] = []

    @property
    def fresh(self) -> list[Trace]:
        """What is new since the tick before; where nothing is, what is replayed."""
        return [s.trace for s in self._fresh]

    def begin(self) -> None:
        """Back to the first stage of the mixture, fresh traces alone."""
        self.steps = 0

    def read(self, skipped: Collection[str]) -> bool:
        """One look at the table for a whole tick: of each stratum as many traces as its share can use. Whether there are any.

        Args:
          skipped: domains that need no rehearsal.
        Raises:
          TableUnavailable: it cannot be reached.
        """
        draws = self._learn.batch_traces * self._learn.steps_per_tick
        fresh, selected, anchors = self._table.fresh(self._last_key, draws), [], []
        if fresh:
            self._last_key = max(s.info.key for s in fresh)
        if self._table.can_sample(1, "recent"):
            selector = Prioritized(self._learn.priority_exponent)
            selected = self._table.sample(draws, selector, self._rng, "recent")
        if self._table.can_sample(1, "anchors"):
            anchors = self._table.sample(draws, Uniform(), self._rng, "anchors")
        self._selected = [s for s in selected if s.trace.domain not in skipped]
        self._anchors = [s for s in anchors if s.trace.domain not in skipped]
        self._fresh = fresh or self._selected
        if len(self._uses) > 2 * _COUNTED:
            self._uses = Counter({key: self._uses[key] for key in sorted(self._uses)[-_COUNTED:]})
        return bool(self._fresh)

    def draw(self, hold: float) -> tuple[list[ReplaySample], NDArray[np.float64]]:
        """One step's traces and their importance weights [B].

        Args:
          hold: how many times their share the anchors get.
        """
        learn = self._learn
        mixture = Mixture(learn.lam, learn.epsilon * hold, learn.mix_after)
        counts = mixture.counts(learn.batch_traces, self.steps)
        fresh = self._uniform(self._fresh, counts.fresh)
        selected = self._least_used(self._selected or self._fresh, counts.selected)
        anchors = self._uniform(self._anchors or self._fresh, counts.anchors)
        weights = np.ones(learn.batch_traces)
        if selected:
            probabilities = np.array([s.info.probability for s in selected])
            there = slice(len(fresh), len(fresh) + len(selected))
            weights[there] = importance_weights(probabilities, selected[0].info.table_size, learn.importance_exponent)
        return fresh + selected + anchors, weights

    def advance(self) -> None:
        """A step was taken."""
        self.steps += 1

    def _uniform(self, pool: list[ReplaySample], n: int) -> list[ReplaySample]:
        return self._used([pool[i] for i in self._rng.integers(len(pool), size=n)])

    def _least_used(self, pool: list[ReplaySample], n: int) -> list[ReplaySample]:
        uses = [self._uses[s.info.key] for s in pool]
        return self._used([pool[i] for i in least_used(uses, n, self._learn.use_exponent, self._rng)])

    def _used(self, chosen: list[ReplaySample]) -> list[ReplaySample]:
        self._uses.update(s.info.key for s in chosen)
        return chosen
