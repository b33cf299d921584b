"""Temperature, top-k and top-p: the served distribution, the same for target and draft, at serving and at evaluation."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def served_probs(logits: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """The distribution that tokens are drawn from under one request's sampling parameters.

    Args:
      logits: float32 [N, V].
      temperature: above 0.
      top_k: 0 keeps all.
      top_p: 1 keeps all.
    Returns: float32 [N, V], rows sum to 1.
    Raises: ValueError: temperature not above 0 (greedy decoding draws from no distribution).
    """
    if not temperature > 0:
        raise ValueError(f"temperature ({temperature}) must be above 0; greedy decoding draws from no distribution")
    probs = (logits / temperature).softmax(-1)
    if top_k <= 0 and top_p >= 1.0:
        return probs
    rows, vocab = probs.shape
    keep = torch.full((rows,), min(top_k, vocab) if top_k > 0 else vocab, device=probs.device)
    mass = torch.full((rows,), top_p if top_p < 1.0 else 2.0, device=probs.device)
    return truncate(probs, keep, mass)


def truncate(probs: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Keeps each row's `top_k` most likely tokens, then the smallest set of them with mass `top_p`; renormalises.

    The order and the meaning are transformers': top-p is measured on the distribution that top-k left. Tokens tied
    with the last one kept are kept too, so the result does not depend on how a sort orders equal values.

    Args:
      probs: float32 [N, V], rows sum to 1.
      top_k: int64 [N], in 1..V.
      top_p: float32 [N], above 0; above 1 keeps all.
    Returns: float32 [N, V], rows sum to 1.
    """
    ordered = _descending(probs)
    mass = ordered.cumsum(-1)
    total = mass.gather(1, top_k[:, None] - 1)
    # A token belongs to the nucleus if the mass before it is still short of top_p.
    nucleus = ((mass - ordered) < top_p[:, None] * total).sum(-1)
    keep = torch.minimum(nucleus.clamp_(min=1), top_k)
    kept = probs.masked_fill(probs < ordered.gather(1, keep[:, None] - 1), 0.0)
    return kept / kept.sum(-1, keepdim=True)


def _descending(probs: Tensor) -> Tensor:
    """Each row's values in descending order. On the CPU numpy's vectorised sort is ten times as fast as torch's."""
    if probs.device.type == "cpu":
        return torch.from_numpy(np.sort(probs.numpy(), axis=-1)).flip(-1)
    return probs.sort(-1, descending=True).values
