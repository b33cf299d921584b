"""What acceptance a draft will have, from what it had: mean acceptance length with its interval.

MAL is a ratio of sums, emitted tokens over rounds, so whole traces (or whole blocks of traces) are resampled and the sums
formed anew. The interval is of the mean over such traffic; a future mean over few requests strays further by its own noise.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from policies.gate import Interval

#: Elements of the resampling matrix held at once (16 MiB of float64).
_ELEMENTS = 1 << 21


def mal_interval(
    emitted: npt.ArrayLike,
    rounds: npt.ArrayLike,
    rng: np.random.Generator,
    *,
    resamples: int = 1000,
    level: float = 0.95,
) -> Interval:
    """MAL of N traces or blocks with its percentile interval (Efron and Tibshirani 1993, ch. 13).

    Args:
      emitted: [N] tokens.
      rounds: [N] expected rounds, above 0 in sum.
      rng: drives the resampling.
      resamples: bootstrap samples, at least 1.
      level: coverage of the two-sided interval.

    Returns: NaN throughout for no traces, NaN bounds for one.
    Raises: ValueError: lengths differ, or resamples or level out of range.
    """
    sums = np.stack([np.asarray(emitted, np.float64), np.asarray(rounds, np.float64)], axis=1)
    if resamples < 1:
        raise ValueError(f"resamples ({resamples}) must be at least 1")
    if not 0.0 < level < 1.0:
        raise ValueError(f"level ({level}) must be strictly between 0 and 1")
    n = len(sums)
    if n == 0:
        return Interval(math.nan, math.nan, math.nan)
    mean = float(sums[:, 0].sum() / sums[:, 1].sum())
    if n == 1:
        return Interval(mean, math.nan, math.nan)
    block = max(1, _ELEMENTS // n)
    found = []
    for start in range(0, resamples, block):
        draws = rng.multinomial(n, np.full(n, 1.0 / n), size=min(block, resamples - start)).astype(np.float64) @ sums
        found.append(draws[:, 0] / draws[:, 1])
    low, high = np.quantile(np.concatenate(found), [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    return Interval(mean, float(low), float(high))
