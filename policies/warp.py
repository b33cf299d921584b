"""Temperature, top-k and top-p applied to logits: the same for target and draft, at serving and at evaluation."""

from __future__ import annotations

import torch
from torch import Tensor


def warp_logits(logits: Tensor, temperature: float | Tensor, top_k: int | Tensor = 0, top_p: float | Tensor = 1.0) -> Tensor:
    """Logits of the served distribution; excluded tokens become -inf. Order as in transformers: temperature, top-k, top-p.

    Args:
      logits: [..., V] float32.
      temperature: above 0; a number, or a tensor that broadcasts against `logits[..., :1]`.
      top_k: keep the k most likely; 0 keeps all. Ties at the threshold are all kept.
      top_p: keep the smallest set of most likely tokens whose mass reaches top_p; 1 keeps all. At least one is kept.

    Returns: [..., V], same dtype.
    """
    logits = logits / temperature
    limited = bool(torch.as_tensor(top_k).gt(0).any()) or bool(torch.as_tensor(top_p).lt(1).any())
    if not limited:
        return logits
    ordered, indices = logits.sort(dim=-1, descending=True)
    vocab = logits.shape[-1]
    k = torch.as_tensor(top_k, device=logits.device)
    k = torch.where(k > 0, k.clamp(max=vocab), vocab)
    threshold = ordered.gather(-1, (k - 1).expand(*logits.shape[:-1], 1).long())
    ordered = ordered.masked_fill(ordered < threshold, -torch.inf)
    mass = ordered.softmax(-1)
    # A token stays if the mass before it is below top_p: the first always does.
    drop = (mass.cumsum(-1) - mass) >= torch.as_tensor(top_p, device=logits.device)
    ordered = ordered.masked_fill(drop & (mass.cumsum(-1) - mass > 0), -torch.inf)
    return torch.empty_like(logits).scatter_(-1, indices, ordered)
