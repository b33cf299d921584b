"""What the shift benchmark says of a learner, from the requests of one run beside the frozen draft's and the oracle's.

All are differences or ratios of mean acceptance length (MAL, a ratio of sums) on the *same* answers, so what makes one
request harder than another cancels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy import stats

FloatArray = NDArray[np.float64]

#: Requests whose ratio of sums is one point of a curve.
BIN = 50
#: Requests on either side of a return that forgetting compares.
RETURN_WINDOW = 100
#: Least gain of the oracle over the frozen draft, relative, that a recovery can be a share of: below it the share of
#: next to nothing is noise.
LEAST_GAIN = 0.02


@dataclass(frozen=True, slots=True)
class Curve:
    """Expected counts of N requests in order."""

    emitted: FloatArray
    rounds: FloatArray

    def mal(self, start: int, stop: int) -> float:
        """MAL of requests start .. stop-1; NaN for none."""
        rounds = self.rounds[start:stop].sum()
        return float(self.emitted[start:stop].sum() / rounds) if rounds > 0 else math.nan

    def binned(self, start: int, stop: int) -> FloatArray:
        """MAL of each bin of `edges`."""
        return np.array([self.mal(a, b) for a, b in pairwise(edges(start, stop))])


def edges(start: int, stop: int) -> list[int]:
    """Bins of `BIN` requests from start on; a shorter last one is joined to the one before it."""
    return [*range(start, max(start + 1, stop - BIN + 1), BIN), stop]


def area(learner: Curve, frozen: Curve, start: int, stop: int) -> float:
    """Area between two curves: sum over bins of the difference in MAL times the bin's requests."""
    if stop <= start:
        return 0.0
    gain = learner.binned(start, stop) - frozen.binned(start, stop)
    return float(gain @ np.diff(edges(start, stop)))


def recovery(learner: Curve, frozen: Curve, oracle: Curve, phases: Sequence[tuple[int, int]], settle: int = 0) -> float:
    """Area gained over the frozen draft as a share of the oracle's, over all phases, each from its request `settle` on.

    Returns: 1 for the oracle, 0 for the frozen draft; NaN where the oracle gains less than `LEAST_GAIN`.
    """
    spans = [(min(start + settle, stop), stop) for start, stop in phases]
    best = sum(area(oracle, frozen, *span) for span in spans)
    base = sum(frozen.mal(*span) * (span[1] - span[0]) for span in spans if span[1] > span[0])
    if not best > LEAST_GAIN * base > 0.0:
        return math.nan
    return sum(area(learner, frozen, *span) for span in spans) / best


def time_to(learner: Curve, frozen: Curve, oracle: Curve, phase: tuple[int, int], share: float = 0.9) -> float:
    """Requests from a phase's start to the end of the first bin whose gain is at least `share` of the oracle's mean gain.

    Returns: the phase's length where that never comes (a lower bound), NaN where the oracle gains next to nothing.
    """
    start, stop = phase
    best = area(oracle, frozen, start, stop) / (stop - start)
    if not best > LEAST_GAIN * frozen.mal(start, stop):
        return math.nan
    gains = learner.binned(start, stop) - frozen.binned(start, stop)
    reached = np.flatnonzero(gains >= share * best)
    return float(edges(start, stop)[reached[0] + 1] - start) if len(reached) else float(stop - start)


def forgetting(learner: Curve, frozen: Curve, first: tuple[int, int], back: tuple[int, int]) -> float:
    """Loss on a phase's return: 1 - (MAL on its first requests) / (MAL on the last ones of the first leg).

    Both are taken relative to the frozen draft's on the same requests, which takes their difficulty out. Negative: the
    return begins better than the first leg ended.
    """
    before = (max(first[0], first[1] - RETURN_WINDOW), first[1])
    after = (back[0], min(back[1], back[0] + RETURN_WINDOW))
    held = learner.mal(*after) / frozen.mal(*after)
    had = learner.mal(*before) / frozen.mal(*before)
    return 1.0 - held / had


def interval(values: Sequence[float], level: float = 0.95) -> dict[str, float | None]:
    """Mean over seeds with its Student interval, {"mean", "low", "high"}; None where unknown (NaN, or one seed)."""
    known = np.array([v for v in values if math.isfinite(v)])
    if not len(known):
        return {"mean": None, "low": None, "high": None}
    mean = float(known.mean())
    if len(known) < 2:
        return {"mean": mean, "low": None, "high": None}
    half = float(stats.t.ppf((1 + level) / 2, len(known) - 1) * known.std(ddof=1) / math.sqrt(len(known)))
    return {"mean": mean, "low": mean - half, "high": mean + half}


def median_interval(values: Sequence[float], level: float = 0.95, resamples: int = 2000) -> tuple[float, float]:
    """Where the median lies: percentile bootstrap (Efron and Tibshirani 1993, ch. 13), with a fixed seed.

    Raises: ValueError: no values.
    """
    if not len(values):
        raise ValueError("values (0) must be at least one")
    picks = np.random.default_rng(0).integers(len(values), size=(resamples, len(values)))
    low, high = np.quantile(np.median(np.asarray(values)[picks], axis=1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
