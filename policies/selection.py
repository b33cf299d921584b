"""Which traces to learn from: draws with known probabilities, and how many of each kind a batch holds.

`Prioritized` and `Uniform` satisfy the replay table's selector contract: (priorities [N], n, rng) -> (indices [n],
probabilities [n]), where a probability is that of one draw, so n * probability is the expected number of copies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

#: Added before rounding down a running total, so that a product such as 3 * (1/3) counts as the whole number it is.
_ROUNDING_SLACK = 1e-9


def prioritized(
    priorities: npt.ArrayLike, n: int, exponent: float, rng: np.random.Generator
) -> tuple[IntArray, FloatArray]:
    """Draw n indices with probability priority^exponent / sum, stratified.

    Stratified: the unit interval is cut into n equal parts and each gives one draw (Schaul et al. 2016, appendix
    B.2.1). Expected counts are exactly n * probability, with fewer duplicates than independent draws: an index whose
    probability is at most 1/n comes at most twice. The order is shuffled.

    Args:
      priorities: [N] finite, at least 0, at least one above 0; a priority of 0 is never drawn unless exponent is 0.
      n: number of draws, at least 0; may exceed N.
      exponent: 0 draws uniformly, 1 in proportion.

    Returns: indices [n], probability of each draw [n].
    Raises: ValueError: an argument breaks its rule.
    """
    values = np.asarray(priorities, dtype=np.float64)
    _require_counts(values.size, n)
    if values.ndim != 1 or not np.isfinite(values).all() or (values < 0.0).any():
        raise ValueError(f"priorities {values.shape} must be one-dimensional, finite and at least 0")
    if not (exponent >= 0.0 and math.isfinite(exponent)):
        raise ValueError(f"exponent ({exponent}) must be finite and at least 0")
    if not (values > 0.0).any():
        raise ValueError("priorities (all 0) must hold at least one above 0; use uniform instead")
    # Scaled first: a large exponent then underflows the small ones instead of overflowing the large ones.
    weights = (values / values.max()) ** exponent
    probabilities = weights / weights.sum()
    edges = np.cumsum(probabilities)
    draws = (np.arange(n) + rng.random(n)) / max(n, 1) * edges[-1]
    # Rounding may put the last draw on the last edge itself.
    last = int(np.flatnonzero(probabilities)[-1])
    indices = np.minimum(np.searchsorted(edges, draws, side="right"), last).astype(np.int64)
    rng.shuffle(indices)
    return indices, probabilities[indices]


def uniform(size: int, n: int, rng: np.random.Generator) -> tuple[IntArray, FloatArray]:
    """Draw n of `size` indices uniformly, without repetition as far as n allows: counts differ by at most one.

    Returns: indices [n] in random order, probabilities [n] all 1 / size.
    Raises: ValueError: nothing to draw from, n negative.
    """
    _require_counts(size, n)
    whole, rest = divmod(n, size)
    parts = [np.tile(np.arange(size), whole), rng.choice(size, size=rest, replace=False)]
    indices = np.concatenate(parts).astype(np.int64)
    rng.shuffle(indices)
    return indices, np.full(n, 1.0 / size)


def least_used(uses: npt.ArrayLike, n: int, exponent: float, rng: np.random.Generator) -> IntArray:
    """Draw n indices with probability (1 + uses)^-exponent / sum: what was learned from least comes first.

    A learner whose stream changes else spends most of its steps on what it has learned long ago, of which there is more
    (ours; Reverb bounds the samples per insert to the same end: Cassirer et al. 2021, "Reverb").

    Args:
      uses: [N] at least 0.
      n: number of draws, at least 0, with repetition.
      exponent: 0 draws uniformly.

    Returns: indices [n].
    Raises: ValueError: nothing to draw from, n negative.
    """
    counts = np.asarray(uses, dtype=np.float64)
    _require_counts(counts.size, n)
    weights = (1.0 + counts) ** -exponent
    return rng.choice(counts.size, size=n, p=weights / weights.sum())


@dataclass(frozen=True, slots=True)
class Prioritized:
    """Selector: `prioritized` with this exponent."""

    exponent: float = 1.0

    def __call__(self, priorities: FloatArray, n: int, rng: np.random.Generator) -> tuple[IntArray, FloatArray]:
        """Indices [n] and the probability of each draw [n]."""
        return prioritized(priorities, n, self.exponent, rng)


@dataclass(frozen=True, slots=True)
class Uniform:
    """Selector: `uniform`, whatever the priorities are."""

    def __call__(self, priorities: FloatArray, n: int, rng: np.random.Generator) -> tuple[IntArray, FloatArray]:
        """Indices [n] and the probability of each draw [n]."""
        return uniform(len(priorities), n, rng)


def importance_weights(probabilities: npt.ArrayLike, size: int, exponent: float) -> FloatArray:
    """(1 / (size * probability))^exponent, divided by the largest of the batch (Schaul et al. 2016, section 3.4).

    Args:
      probabilities: [n] probability of each draw, above 0.
      size: traces that were drawn from, N.
      exponent: 1 undoes the priorities fully, 0 gives all ones.

    Returns: [n] within (0, 1].
    Raises: ValueError: a probability outside (0, 1], size below 1, exponent negative.
    """
    values = np.asarray(probabilities, dtype=np.float64)
    if not ((values > 0.0) & (values <= 1.0)).all():
        raise ValueError("probabilities must lie within (0, 1]; take them from the samples")
    if size < 1:
        raise ValueError(f"size ({size}) must be at least 1")
    if not exponent >= 0.0:
        raise ValueError(f"exponent ({exponent}) must be at least 0")
    weights: FloatArray = (1.0 / (size * values)) ** exponent
    return weights / weights.max() if weights.size else weights


@dataclass(frozen=True, slots=True)
class Counts:
    """How many traces of each kind one batch holds; they sum to the batch."""

    fresh: int
    selected: int
    anchors: int


@dataclass(frozen=True, slots=True)
class Mixture:
    """fresh : selected : anchors = 1 : lam : epsilon, after a warm-up on fresh traces alone (design section 5).

    Whole numbers are reached by carrying the remainder from step to step, so that even an epsilon worth less than one
    trace a batch gets its share in the long run. Where the fresh share is worth less than one trace a batch, a step in
    which selected and anchors both round up gives the anchors precedence.
    """

    #: Weight of the SurpriseRatio-selected traces, relative to fresh.
    lam: float
    #: Weight of the anchors, relative to fresh.
    epsilon: float
    #: Steps of fresh traces only, before mixing starts.
    warmup_steps: int

    def __post_init__(self) -> None:
        for name, value in (("lam", self.lam), ("epsilon", self.epsilon), ("warmup_steps", self.warmup_steps)):
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name} ({value}) must be finite and at least 0")

    def counts(self, batch: int, step: int) -> Counts:
        """Counts of step `step` (0-based) for a batch of `batch` traces.

        Raises: ValueError: batch or step negative.
        """
        if batch < 0 or step < 0:
            raise ValueError(f"batch ({batch}) and step ({step}) must be at least 0")
        if step < self.warmup_steps:
            return Counts(fresh=batch, selected=0, anchors=0)
        total = 1.0 + self.lam + self.epsilon
        mixed = step - self.warmup_steps
        anchors = min(batch, _whole_part(batch * self.epsilon / total, mixed))
        selected = min(batch - anchors, _whole_part(batch * self.lam / total, mixed))
        return Counts(fresh=batch - anchors - selected, selected=selected, anchors=anchors)


def _whole_part(share: float, step: int) -> int:
    """Whole traces due at `step` at `share` traces a step: the increments of a running total, rounded down."""
    return math.floor((step + 1) * share + _ROUNDING_SLACK) - math.floor(step * share + _ROUNDING_SLACK)


def _require_counts(size: int, n: int) -> None:
    if size < 1:
        raise ValueError(f"number of traces ({size}) must be at least 1; ask can_sample first")
    if n < 0:
        raise ValueError(f"n ({n}) must be at least 0")
