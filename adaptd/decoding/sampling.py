"""Distributions as served: temperature, then top-k, then top-p, applied alike to target and draft; and draws from them.

Greedy rows are a branch of their own: they take the most likely token, and no temperature ever stands in for zero.
All functions are batched over rows and never look at a value on the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from adaptd.decoding.request import SamplingParams
from policies.warp import truncate


@dataclass(frozen=True, slots=True)
class RowParams:
    """Sampling parameters of B rows as tensors, rebuilt only when rows join or leave."""

    temperature: Tensor
    """float32 [B]; 1 for greedy rows."""
    greedy: Tensor
    """bool [B]."""
    any_greedy: bool
    any_sampled: bool
    truncated: Tensor | None
    """int64 [T]: the sampled rows that use top-k or top-p; None if none does."""
    top_k: Tensor
    """int64 [T]; the vocabulary's size where off."""
    top_p: Tensor
    """float32 [T]; above 1 where off."""

    @staticmethod
    def build(params: Sequence[SamplingParams], vocab_size: int, device: torch.device) -> RowParams:
        """Tensors for these rows on `device`."""
        greedy = [p.greedy for p in params]
        cut = [i for i, p in enumerate(params) if not p.greedy and (p.top_k > 0 or p.top_p < 1.0)]
        return RowParams(
            temperature=torch.tensor([1.0 if p.greedy else p.temperature for p in params], device=device),
            greedy=torch.tensor(greedy, device=device),
            any_greedy=any(greedy),
            any_sampled=not all(greedy),
            truncated=torch.tensor(cut, device=device) if cut else None,
            top_k=torch.tensor([min(params[i].top_k or vocab_size, vocab_size) for i in cut], device=device),
            top_p=torch.tensor([params[i].top_p if params[i].top_p < 1.0 else 2.0 for i in cut], device=device),
        )

    def tensors(self) -> list[Tensor]:
        """Those that are read, in order."""
        return [self.temperature, self.greedy] + (
            [] if self.truncated is None else [self.truncated, self.top_k, self.top_p]
        )

    def replaced(self, tensors: Sequence[Tensor]) -> RowParams:
        """The same with others in the place of `tensors`."""
        if self.truncated is None:
            return replace(self, temperature=tensors[0], greedy=tensors[1])
        temperature, greedy, truncated, top_k, top_p = tensors
        return replace(self, temperature=temperature, greedy=greedy, truncated=truncated, top_k=top_k, top_p=top_p)

    def filled(self, rows: int) -> RowParams:
        """The same with sampled rows behind them, for shapes that are few: also where some are truncated, as many as rows."""
        more = rows - len(self.greedy)
        full = replace(
            self, temperature=pad(self.temperature, (0, more), value=1.0), greedy=pad(self.greedy, (0, more))
        )
        if self.truncated is None:
            return full
        # The first of them again: the same values are written where they were.
        again = torch.arange(rows, device=self.truncated.device) % len(self.truncated)
        return replace(full, truncated=self.truncated[again], top_k=self.top_k[again], top_p=self.top_p[again])


def warp(logits: Tensor, params: RowParams) -> Tensor:
    """The served distribution of each row.

    Args:
      logits: float32 [B, V] or [B, Q, V].
      params: of the B rows.
    Returns: probabilities of the same shape. Greedy rows come out at temperature 1 and are not meant to be drawn from.
    """
    shape = (-1,) + (1,) * (logits.dim() - 1)
    # Relative to the largest, so that a low temperature sends the others to -inf and none to +inf.
    probs = ((logits - logits.amax(-1, keepdim=True)) / params.temperature.view(shape)).softmax(-1)
    if params.truncated is not None:
        cut = probs[params.truncated]
        repeat = cut[0, ..., 0].numel()
        flat = truncate(
            cut.reshape(-1, cut.shape[-1]),
            params.top_k.repeat_interleave(repeat),
            params.top_p.repeat_interleave(repeat),
        )
        probs[params.truncated] = flat.view(cut.shape)
    return probs


def inverse_cdf(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Draws one token a row by inverting the cumulative distribution.

    Args:
      weights: float32 [N, V], non-negative, at least one positive a row; need not sum to 1.
      uniforms: float32 [N] in [0, 1).
    Returns: int64 [N]; a token of weight zero is never drawn.
    """
    mass = weights.cumsum(-1)
    drawn = torch.searchsorted(mass, uniforms[:, None] * mass[:, -1:], right=True)
    return drawn.squeeze(1).clamp_(max=weights.shape[-1] - 1)


def choose(logits: Tensor, params: RowParams, uniforms: Tensor) -> tuple[Tensor, Tensor | None]:
    """Draws each row's next token from a model's served distribution.

    Args:
      logits: float32 [B, V].
      params: of the B rows.
      uniforms: float32 [B] in [0, 1); unused by greedy rows.
    Returns: tokens int64 [B], and the distribution they were drawn from [B, V] (None if every row is greedy).
    """
    if not params.any_sampled:
        return logits.argmax(-1), None
    probs = warp(logits, params)
    tokens = inverse_cdf(probs, uniforms)
    if params.any_greedy:
        tokens = torch.where(params.greedy, logits.argmax(-1), tokens)
    return tokens, probs
