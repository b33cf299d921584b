"""What makes a trace worth replaying, by name: the SurpriseRatio's scores, and means over positions of simpler measures.

The former read only what the draft thought of the emitted tokens (`policies.surprise`); those here compare whole
distributions, at the positions whose target distribution was captured.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from policies.divergence import entropy, overlap
from policies.surprise import PRIORITY_FLOOR, Mode

#: `loss`: what the step minimised, as in prioritised replay (Schaul et al. 2016); `entropy`: how flat the target is;
#: `overlap`: how much of it the draft misses.
Measure = Literal["loss", "entropy", "overlap"]
#: Every priority that a configuration may name.
Priority = Mode | Measure


def is_measure(name: Priority) -> bool:
    """Whether `measured_priorities` knows it; the others are modes of `policies.surprise.surprise_priority`.

    Raises: ValueError: neither knows it.
    """
    if name not in (*get_args(Mode), *get_args(Measure)):
        raise ValueError(f"priority ({name!r}) must be one of: {', '.join((*get_args(Mode), *get_args(Measure)))}")
    return name in get_args(Measure)


def measured_priorities(
    name: Measure, *, p: Tensor, q: Tensor, loss: Tensor, row: Tensor, traces: int
) -> list[float | None]:
    """Priority of each trace: `PRIORITY_FLOOR` and the mean of the measure over its positions.

    `entropy` is relative to that of K+1 equal outcomes and `overlap` is 1 - beta, both within [0, 1]; `loss` keeps its
    unit. All grow with what there is to learn, or is believed to.

    Args:
      p, q: [N, K+1] log-probabilities of target and draft with tail.
      loss: [N] the objective at each position, at least 0.
      row: [N] the trace that each position belongs to, below `traces`.
      traces: number of traces.

    Returns: one finite value above 0 for each trace; None for one without a position, or with a loss that is not finite.
    """
    if name == "loss":
        values = loss
    elif name == "entropy":
        values = entropy(p) / math.log(p.shape[-1])
    else:
        values = 1.0 - overlap(p, q)
    values = values.detach().double()
    sums = torch.zeros(traces, dtype=torch.float64, device=values.device).index_add_(0, row, values)
    # Rounding may leave an overlap a hair above 1.
    means = (sums / torch.bincount(row, minlength=traces)).clamp_min(0.0)
    return [PRIORITY_FLOOR + mean if math.isfinite(mean) else None for mean in means.tolist()]
