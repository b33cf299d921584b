"""What speculation is worth at measured costs: S = MAL / (1 + k c_d + c_v).

A round of k proposals costs k draft steps and one target pass over k + 1 positions, and emits MAL tokens; without
speculation a target step emits one. With the cost of a target step as the unit, c_d is a draft step, c_v what verifying
k + 1 positions costs above verifying one. The denominator is the price of a round in target steps, and so the MAL below
which speculation loses time. Both ratios change with load: at a large batch the target's pass is no longer bound by
memory, and c_v grows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Costs:
    """Measured cost ratios at one load, in target steps."""

    #: c_d: one draft step.
    draft: float
    #: c_v: the extra cost of verifying k + 1 positions instead of one.
    verify: float

    def __post_init__(self) -> None:
        for name, value in (("draft", self.draft), ("verify", self.verify)):
            if not (value >= 0.0 and math.isfinite(value)):
                raise ValueError(f"{name} ({value}) must be finite and at least 0, in target steps")

    def round(self, k: float) -> float:
        """Price of a round with k proposals, or k on average, in target steps: the MAL at which speculation breaks even.

        Raises: ValueError: k below 0.
        """
        if k < 0:
            raise ValueError(f"k ({k}) must be at least 0")
        # Without proposals there is nothing to verify either.
        return 1.0 + k * self.draft + self.verify if k else 1.0


def expected_speedup(mal: float, k: float, costs: Costs) -> float:
    """Tokens a second with speculation over tokens a second without; below 1 speculation costs time.

    Args:
      mal: mean acceptance length, within [1, k + 1].
      k: proposals a round; a mean where they differ.

    Raises: ValueError: mal outside [1, k + 1] or NaN.
    """
    if not 1.0 <= mal <= k + 1.0:
        raise ValueError(f"mal ({mal}) must lie within [1, {k + 1}], one token more than the {k} proposals")
    return mal / costs.round(k)


def mal_at(accept_at: Sequence[float], k: int) -> float:
    """MAL with k proposals a round, from the acceptance at each depth given that it was reached.

    Args:
      accept_at: [K] probabilities; depth i counts from 0. K at least k.

    Raises: ValueError: a value outside [0, 1], or fewer depths than k.
    """
    if len(accept_at) < k:
        raise ValueError(f"accept_at ({len(accept_at)} depths) must reach depth k ({k})")
    mal, survives = 1.0, 1.0
    for value in accept_at[:k]:
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"accept_at ({value}) must lie within [0, 1]")
        survives *= value
        mal += survives
    return mal


def best_depth(accept_at: Sequence[float], costs: Costs) -> tuple[int, float]:
    """The k, from 0 (no speculation) to the number of depths given, with the highest expected speed-up, and that.

    c_v is taken as the same for every k, which it is while the target's pass is bound by memory.
    """
    speedups = [mal_at(accept_at, k) / costs.round(k) for k in range(len(accept_at) + 1)]
    best = max(range(len(speedups)), key=speedups.__getitem__)
    return best, speedups[best]


def recommended_depth(accept_at: Sequence[float], costs: Mapping[int, Costs]) -> tuple[int, float]:
    """As `best_depth`, among the k whose costs were measured: c_v of each is its own, as on a machine bound by arithmetic.

    Returns: k (0 where no speculation pays) and its expected speed-up.
    Raises: ValueError: fewer depths than a measured k, or k below 1.
    """
    for k in costs:
        if not 1 <= k <= len(accept_at):
            raise ValueError(f"k ({k}) must lie within 1 and the {len(accept_at)} depths of accept_at")
    speedups = {0: 1.0} | {k: mal_at(accept_at, k) / price.round(k) for k, price in costs.items()}
    best = max(speedups, key=speedups.__getitem__)
    return best, speedups[best]
