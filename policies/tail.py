"""Draws of the target's tail: what its K most likely tokens leave over, told by a few tokens of it.

K tokens and one bucket for all others say how much a draft should give the tail and nothing about which tokens of it.
Tokens drawn from the tail in proportion to what the target gives them do, without bias: the mean of -log q over them is
the cross-entropy of the tail (Anshumann et al. 2025, "Sparse Logit Sampling: Accelerating Knowledge Distillation in LLMs",
section 4, there for the whole distribution).
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def draw_tail(logprobs: Tensor, ids: Tensor, n: int, offset: Tensor) -> Tensor:
    """`n` tokens a row of those that are not among `ids`, in proportion to their probability.

    Systematic sampling: one number a row places n evenly spaced marks on the cumulative distribution, so that a token of
    probability m within the tail comes floor(n m) or ceil(n m) times.

    Args:
      logprobs: float [..., V] nats, up to a constant a row.
      ids: int64 [..., K], distinct within a row.
      offset: float [...] in [0, 1), uniform.
    Returns: int64 [..., n]; meaningless where the others have no mass.
    """
    mass = logprobs.float().softmax(-1).scatter_(-1, ids, 0.0).cumsum(-1)
    marks = (torch.arange(n, device=mass.device) + offset.float()[..., None]) / n
    drawn = torch.searchsorted(mass, (marks * mass[..., -1:]).contiguous(), right=True)
    return drawn.clamp_(max=mass.shape[-1] - 1)


def captured_draws(logprobs: Tensor, ids: Tensor, n: int, rng: np.random.Generator) -> NDArray[np.uint32] | None:
    """`draw_tail` of [N, V] as a trace holds it, uint32 [N, n]; None if `n` is 0 or the K leave no token over."""
    if n == 0 or ids.shape[-1] == logprobs.shape[-1]:
        return None
    offset = torch.from_numpy(rng.random(len(logprobs), np.float32)).to(logprobs.device)
    found: NDArray[np.uint32] = draw_tail(logprobs, ids, n, offset).numpy(force=True).astype(np.uint32)
    return found
