"""SurpriseRatio: how strongly the draft believed in what the target emitted, and a trace's priority from it.

Source: "Aligning draft and target in speculative decoding" (reference/papers.md, paper 1):
SR_t = q(x_t) / mean of the draft's top-k probabilities; S = mean over t of 1[SR_t > tau].
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
Mode = Literal["agreement", "surprise", "uniform"]

#: Least priority, so that every trace can still be drawn and its importance weight stays bounded.
PRIORITY_FLOOR = 0.01


def surprise_ratio(token_logprob: npt.ArrayLike, draft_topk_logprobs: npt.ArrayLike) -> FloatArray:
    """SR_t = q(x_t) / mean of the draft's k largest probabilities.

    Args:
      token_logprob: [R] log q of the emitted tokens, nats; NaN where unknown.
      draft_topk_logprobs: [R, k] the draft's k largest log-probabilities at the same positions, nats.

    Returns: [R] within [0, k]; 1 where the token is as likely as the mean of the draft's favourites; NaN where unknown.
    Raises: ValueError: shapes do not fit, or k is 0.
    """
    token = np.asarray(token_logprob, dtype=np.float64)
    topk = np.asarray(draft_topk_logprobs, dtype=np.float64)
    if token.ndim != 1 or topk.ndim != 2 or topk.shape[0] != token.shape[0] or topk.shape[1] == 0:
        raise ValueError(f"draft_topk_logprobs {topk.shape} must be [R, k], k >= 1, for token_logprob {token.shape}")
    # Relative to the favourite: its probability may be small, but the ratio does not underflow.
    favourite = topk.max(axis=1, initial=-np.inf)
    known = np.isfinite(favourite) & ~np.isnan(token) & ~np.isnan(topk).any(axis=1)
    ratios = np.full(token.shape, np.nan)
    mean = np.exp(topk[known] - favourite[known, None]).mean(axis=1)
    ratios[known] = np.exp(token[known] - favourite[known]) / mean
    return ratios


def sequence_score(ratios: npt.ArrayLike, tau: float) -> float:
    """S = share of the tokens with SR > tau; tokens whose ratio is NaN (unknown) are left out.

    Returns: within [0, 1]; NaN if no ratio is known.
    Raises: ValueError: tau negative or NaN.
    """
    if not tau >= 0.0:
        raise ValueError(f"tau ({tau}) must be at least 0")
    values = np.asarray(ratios, dtype=np.float64)
    values = values[~np.isnan(values)]
    return float((values > tau).mean()) if values.size else math.nan


def surprise_priority(ratios: npt.ArrayLike, mode: Mode, tau: float) -> float:
    """Priority of a trace, linear in its score from `PRIORITY_FLOOR` to 1.

    `agreement` prefers a high S (the paper's equation); `surprise` prefers a low one: tokens that the target emitted
    and the draft did not expect; `uniform` is 1 for every trace. A trace without a known ratio gets 1, so that it is
    seen at least once (as new transitions in Schaul et al. 2016, algorithm 1).

    Returns: within [PRIORITY_FLOOR, 1].
    Raises: ValueError: unknown mode, tau negative.
    """
    if mode not in ("agreement", "surprise", "uniform"):
        raise ValueError(f"mode ({mode!r}) must be 'agreement', 'surprise' or 'uniform'")
    score = sequence_score(ratios, tau)
    if mode == "uniform" or math.isnan(score):
        return 1.0
    preference = score if mode == "agreement" else 1.0 - score
    return PRIORITY_FLOOR + (1.0 - PRIORITY_FLOOR) * preference
