"""Divergences between target `p` and draft `q`, one function per formula: log-probabilities in, one value per row out.

Knows nothing of models, masks, weights or reductions: those are decided before and after. Every distribution is given
as the target's K most likely tokens plus one tail bucket (K+1 outcomes, natural logarithms), so by the data-processing
inequality each divergence is a lower bound of the one over the full vocabulary. `with_tail` builds that form for the
target and `draft_with_tail` for the draft, at the target's ids.

At -inf: an outcome that the weighting distribution gives no mass adds nothing (0 log 0 = 0) and gets a zero gradient;
an outcome with mass that the other side gives none makes a KL +inf. JSD and TV are always finite. Gradients flow into
the draft; the target is data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

#: Probability below which the tail bucket is not resolved. Captured log-probabilities are float16 (relative step
#: 2^-11), so the mass left over by K of them carries noise far above this; the floor only keeps the logarithm finite.
TAIL_FLOOR = 1e-8

#: Target entropy, in nats, at which `entropy_adaptive` has half of its TV left, and the width of the change.
ENTROPY_MIDPOINT_NATS = 1.0
ENTROPY_WIDTH_NATS = 0.25


def with_tail(logprobs: Tensor) -> Tensor:
    """The K given log-probabilities and the log of the mass they leave over, renormalised to sum to 1.

    The left-over mass is clamped below at `TAIL_FLOOR`, also where rounding made the K sum exceed 1. Renormalising
    takes that rounding back out, so that divergences of the result are never negative. -inf (padding) stays -inf.

    Args:
      logprobs: [N, K] nats; half precision is computed in float32.

    Returns: [N, K+1] nats, last column the tail.
    Raises: ValueError: not two-dimensional.
    """
    _require_matrix("logprobs", logprobs)
    logprobs = _at_least_float32(logprobs)
    tail = (1.0 - logprobs.exp().sum(-1, keepdim=True)).clamp(min=TAIL_FLOOR).log()
    joined = torch.cat([logprobs, tail], dim=-1)
    return joined - joined.logsumexp(-1, keepdim=True)


def draft_with_tail(draft_logits: Tensor, ids: Tensor) -> Tensor:
    """The draft's log-probabilities at the target's K ids, and the log of the mass of all its other tokens.

    The tail is a log-sum-exp over the other logits, not `1 - sum`: the difference would cancel, and clamping it would
    cut the gradient exactly where the draft wrongly leaves the tail nothing. Only a tail without any token (K = V, or
    all others at -inf) takes the value log `TAIL_FLOOR`. Costs one more [N, V] buffer.

    Args:
      draft_logits: [N, V], any dtype; computed in float32 at least.
      ids: [N, K] integers, distinct within a row.

    Returns: [N, K+1] nats, differentiable in `draft_logits`.
    Raises: ValueError: not two-dimensional, or another number of rows.
    """
    return draft_with_draws(draft_logits, ids, ids[:, :0])[0]


def draft_with_draws(draft_logits: Tensor, ids: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
    """`draft_with_tail`, and the draft's log-probabilities of tokens of the tail within the tail.

    By the chain rule KL(p || q) = KL over the K and the bucket + p(tail) KL within the tail; minus the mean of the second
    result over tokens that were drawn from the target's tail (`policies.tail`) is the last, but for the entropy of p there.

    Args:
      draft_logits, ids: as for `draft_with_tail`.
      drawn: [N, S] integers, none of them among the `ids` of its row; they may repeat.

    Returns: [N, K+1] nats and [N, S] nats, log q(v) - log q(tail), both differentiable in `draft_logits`.
    Raises: ValueError: not two-dimensional, or another number of rows.
    """
    _require_matrix("draft_logits", draft_logits)
    for name, chosen in (("ids", ids), ("drawn", drawn)):
        _require_matrix(name, chosen)
        if chosen.shape[0] != draft_logits.shape[0]:
            raise ValueError(
                f"{name} ({chosen.shape[0]} rows) must have as many rows as draft_logits ({draft_logits.shape[0]})"
            )
    found: tuple[Tensor, Tensor] = _PickedWithTail.apply(  # type: ignore[no-untyped-call]
        _at_least_float32(draft_logits), ids.long(), drawn.long()
    )
    return found


def tail_cross_entropy(p: Tensor, within: Tensor, known: Tensor) -> Tensor:
    """p(tail) times the mean of -log q within the tail over tokens drawn from it, in nats; without any draw 0.

    An unbiased estimate of what KL(p || q) has beyond the K and the bucket, plus a constant (`draft_with_draws`).

    Args:
      p: [N, K+1] log-probabilities with tail.
      within: [N, S], the second result of `draft_with_draws`.
      known: bool [N, S], which of them are draws; the others are padding. One that the draft cannot say is left out.

    Returns: [N].
    """
    known = known & within.detach().isfinite()
    count = known.sum(-1).clamp(min=1)
    return p[:, -1].exp() * -within.masked_fill(~known, 0.0).sum(-1) / count


class _PickedWithTail(torch.autograd.Function):
    """`draft_with_draws` with its gradient written out: one [N, V] buffer and few passes over it, the dearest of a step.

    With e_v = exp(z_v - m) over the other tokens, m their largest logit, the tail is m + log sum e and the total a
    log-sum-exp over K+1 values. d out_i / d z_v = [v is i] - softmax_v for the K, and [v is other] e_v / sum e - softmax_v
    for the tail. Within the tail log q(s) = z_s - tail, with [v is s] - [v is other] e_v / sum e.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
        """[N, V], [N, K] and [N, S] to [N, K+1] and [N, S]."""
        others = logits.scatter(-1, ids, -torch.inf)
        largest = others.amax(-1, keepdim=True)
        empty = largest == -torch.inf
        others.sub_(largest.masked_fill(empty, 0.0)).exp_()
        mass = others.sum(-1, keepdim=True)
        tail = (largest + mass.log()).masked_fill(empty, -torch.inf)
        picked = torch.cat([logits.gather(-1, ids), tail], dim=-1)
        out = picked - picked.logsumexp(-1, keepdim=True)
        within = (logits.gather(-1, drawn) - tail).masked_fill(empty, 0.0)
        ctx.save_for_backward(others, mass, ids, drawn, out)
        # A row without other tokens: its tail is a constant.
        out = out.masked_fill(torch.cat([torch.zeros_like(ids, dtype=torch.bool), empty], -1), math.log(TAIL_FLOOR))
        return out, within

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, within: Tensor) -> tuple[Tensor, None, None]:
        """[N, K+1] and [N, S] to [N, V]."""
        others, mass, ids, drawn, out = ctx.saved_tensors
        empty = out[:, -1:] == -torch.inf
        gradient = torch.cat([gradient[:, :-1], gradient[:, -1:].masked_fill(empty, 0.0)], -1)
        inner = gradient - out.exp() * gradient.sum(-1, keepdim=True)
        within = within.masked_fill(empty, 0.0)
        left = inner[:, -1:] - within.sum(-1, keepdim=True)
        back = (others * (left / mass.masked_fill(empty, 1.0))).scatter_add_(-1, drawn, within)
        return back.scatter_(-1, ids, inner[:, :-1]), None, None


def forward_kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) = sum p log(p / q), in nats, at least 0; +inf where q gives nothing to an outcome of p.

    The divergence of plain distillation (Hinton et al. 2015); by Pinsker, acceptance >= 1 - sqrt(KL / 2).

    Args:
      p, q: [N, M] log-probabilities.

    Returns: [N].
    Raises: ValueError: shapes differ.
    """
    _require_same_shape(p, q)
    return _relative_entropy(p, q)


def reverse_kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(q || p) = sum q log(q / p), in nats, at least 0; +inf where p gives nothing to an outcome of q.

    Mode-seeking: best for low-entropy targets ("Forward or reverse KL?", reference/papers.md, paper 2).

    Args:
      p, q: [N, M] log-probabilities.

    Returns: [N].
    Raises: ValueError: shapes differ.
    """
    _require_same_shape(p, q)
    return _relative_entropy(q, p)


def jensen_shannon(p: Tensor, q: Tensor, beta: float = 0.5) -> Tensor:
    """JSD_b = b KL(p || m) + (1-b) KL(q || m) with m = b p + (1-b) q, in nats; at b = 0.5 within [0, ln 2].

    The generalised form of Agarwal et al. 2024 (GKD, section 2). Its curvature at p = q is b(1-b) times that of a KL,
    so b = 0.5 gives a quarter of a KL's gradient close to the optimum.

    Args:
      p, q: [N, M] log-probabilities.
      beta: weight of p in the mixture, strictly between 0 and 1.

    Returns: [N].
    Raises: ValueError: shapes differ, or beta outside (0, 1).
    """
    _require_same_shape(p, q)
    if not 0.0 < beta < 1.0:
        raise ValueError(f"beta ({beta}) must be strictly between 0 and 1; use forward_kl or reverse_kl for the limits")
    present = (p > -torch.inf) | (q > -torch.inf)
    mixture = torch.logaddexp(
        p.masked_fill(~present, 0.0) + math.log(beta), q.masked_fill(~present, 0.0) + math.log1p(-beta)
    )
    return beta * _relative_entropy(p, mixture) + (1.0 - beta) * _relative_entropy(q, mixture)


def total_variation(p: Tensor, q: Tensor) -> Tensor:
    """TV = 1/2 sum |p - q|, within [0, 1]; 1 - TV = sum min(p, q) is the acceptance under rejection sampling.

    Leviathan et al. 2023, theorem 3.5. On K+1 outcomes TV is a lower bound, so 1 - TV is an upper bound of acceptance.

    Args:
      p, q: [N, M] log-probabilities.

    Returns: [N], no unit.
    Raises: ValueError: shapes differ.
    """
    _require_same_shape(p, q)
    return 0.5 * (p.exp() - q.exp()).abs().sum(-1)


def overlap(p: Tensor, q: Tensor) -> Tensor:
    """beta = sum min(p, q), within [0, 1]: the acceptance under rejection sampling (Leviathan et al. 2023, theorem 3.5).

    1 - TV for distributions that sum to 1; on K+1 outcomes an upper bound of acceptance.

    Args:
      p, q: [N, M] log-probabilities.

    Returns: [N], no unit.
    Raises: ValueError: shapes differ.
    """
    _require_same_shape(p, q)
    return torch.minimum(p, q).exp().sum(-1)


def entropy(p: Tensor) -> Tensor:
    """H(p) = - sum p log p, in nats, within [0, ln M]. With a tail bucket, a lower bound of the full entropy.

    Args:
      p: [N, M] log-probabilities.

    Returns: [N].
    """
    _require_matrix("p", p)
    present = p > -torch.inf
    safe = p.masked_fill(~present, 0.0)
    return -(safe.exp() * safe).masked_fill(~present, 0.0).sum(-1)


def entropy_adaptive(
    p: Tensor,
    q: Tensor,
    midpoint: float = ENTROPY_MIDPOINT_NATS,
    width: float = ENTROPY_WIDTH_NATS,
    tv_weight: float = 1.0,
) -> Tensor:
    """KL(p || q) + tv_weight w TV(p, q) with w = sigmoid((midpoint - H(p)) / width), in nats, at least 0.

    Where the target is sure, TV asks for the acceptance itself; where it is not, KL alone covers what may be said. w is
    smooth and strictly decreasing in H(p), a constant with respect to the draft.

    "Forward or reverse KL?" (reference/papers.md, paper 2) names an adaptive divergence as future work and finds reverse KL
    best where the target is sure, JSD where it is not. Weighed between these two it was among the three worst soft objectives
    at every temperature (docs/experiments.md, "Objective"); this form is level with the best.

    Args:
      p, q: [N, M] log-probabilities.
      midpoint: entropy in nats at which half of the weight is left.
      width: nats over which w moves from 1/2 to 0.27; above 0.
      tv_weight: nats per unit of total variation where the target is sure, at least 0.

    Returns: [N].
    Raises: ValueError: shapes differ, width not positive, tv_weight negative.
    """
    _require_same_shape(p, q)
    if width <= 0.0:
        raise ValueError(f"width ({width}) must be above 0 nats")
    if tv_weight < 0.0:
        raise ValueError(f"tv_weight ({tv_weight}) must be at least 0")
    weight = torch.sigmoid((midpoint - entropy(p)) / width).detach()
    return forward_kl(p, q) + tv_weight * weight * total_variation(p, q)


def kl_tv(p: Tensor, q: Tensor, tv_weight: float = 1.0) -> Tensor:
    """KL(p || q) + tv_weight * TV(p, q): the KL's gradient far from the target, the acceptance's own close to it.

    Args:
      p, q: [N, M] log-probabilities.
      tv_weight: nats per unit of total variation, at least 0.

    Returns: [N].
    Raises: ValueError: shapes differ, or tv_weight negative.
    """
    if tv_weight < 0.0:
        raise ValueError(f"tv_weight ({tv_weight}) must be at least 0")
    return forward_kl(p, q) + tv_weight * total_variation(p, q)


def cross_entropy(draft_logits: Tensor, token_ids: Tensor) -> Tensor:
    """-log q(token), in nats: hard labels, for traffic whose target probabilities are not known.

    On the target's own tokens its expectation is H(p) + KL(p || q).

    Args:
      draft_logits: [N, V], any dtype; computed in float32 at least.
      token_ids: [N] integers.

    Returns: [N].
    Raises: ValueError: shapes do not fit.
    """
    _require_matrix("draft_logits", draft_logits)
    if token_ids.shape != draft_logits.shape[:1]:
        raise ValueError(f"token_ids {tuple(token_ids.shape)} must be [N] for draft_logits {tuple(draft_logits.shape)}")
    return functional.cross_entropy(_at_least_float32(draft_logits), token_ids.long(), reduction="none")


def acceptance_length_loss(accept: Tensor) -> Tensor:
    """Minus the expected number of accepted tokens of a block: - sum_i prod_{j <= i} accept_j, within [-k, 0].

    Leviathan et al. 2023, equation 1, with an acceptance per position in place of one constant.

    Args:
      accept: [B, k] acceptance probability at each depth given that it is reached, in [0, 1]; differentiable.

    Returns: [B] tokens.
    Raises: ValueError: not two-dimensional.
    """
    _require_matrix("accept", accept)
    return -accept.cumprod(-1).sum(-1)


def acceptance_length(p: Tensor, q: Tensor, lengths: Sequence[int], k: int) -> Tensor:
    """Minus the expected accepted tokens of a block of k that starts at each position, within [-k, 0].

    Acceptance at a position is its `overlap`, and a block is worth the `acceptance_length_loss` of the k positions from
    its start on. The gradient of a position is therefore weighted by how likely it is reached from the k blocks that
    cover it and by what it would unlock: unlike with a KL, positions that follow a sure rejection count for nothing but
    the blocks that start behind it. A block ends with its sequence: what lies behind is not known and counts as rejected.

    Args:
      p, q: [N, M] log-probabilities of consecutive positions, sequence after sequence.
      lengths: positions of each sequence, at least 0; they sum to N.
      k: tokens proposed a round, at least 1.

    Returns: [N] tokens.
    Raises: ValueError: shapes differ, lengths do not sum to N, or k below 1.
    """
    _require_same_shape(p, q)
    if k < 1:
        raise ValueError(f"k ({k}) must be at least 1")
    if min(lengths, default=0) < 0 or sum(lengths) != len(p):
        raise ValueError(
            f"lengths (sum {sum(lengths)}) must be at least 0 and sum to the {len(p)} positions of p: blocks need every "
            "position of a sequence; capture all of them, or use an objective that looks at each position alone"
        )
    sizes = torch.tensor(lengths, dtype=torch.int64, device=p.device)
    ends = sizes.cumsum(0).repeat_interleave(sizes)
    covered = torch.arange(len(p), device=p.device)[:, None] + torch.arange(k, device=p.device)
    accept = overlap(p, q)[covered.clamp(max=max(0, len(p) - 1))]
    return acceptance_length_loss(accept.masked_fill(covered >= ends[:, None], 0.0))


def _relative_entropy(weights: Tensor, other: Tensor) -> Tensor:
    """Sum over outcomes of exp(weights) (weights - other), where one without weight adds 0 and has gradient 0."""
    present = weights > -torch.inf
    safe = weights.masked_fill(~present, 0.0)
    terms = safe.exp() * (safe - other.masked_fill(~present, 0.0))
    return terms.masked_fill(~present, 0.0).sum(-1)


def _at_least_float32(values: Tensor) -> Tensor:
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def _require_matrix(name: str, value: Tensor) -> None:
    if value.ndim != 2:
        raise ValueError(f"{name} {tuple(value.shape)} must be two-dimensional; flatten batch and time first")


def _require_same_shape(p: Tensor, q: Tensor) -> None:
    _require_matrix("p", p)
    if p.shape != q.shape:
        raise ValueError(f"p {tuple(p.shape)} and q {tuple(q.shape)} must have one shape; apply with_tail to both")
