"""The exact accept rule of speculative decoding (Leviathan et al. 2023, algorithm 1; Chen et al. 2023, algorithm 2).

p is the target's served distribution, q the draft's *at the time it proposed*. As only that q enters the test, the
output follows p whatever the draft is, and a swap of draft weights between two rounds changes nothing but acceptance.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adaptd.decoding.sampling import RowParams, inverse_cdf, warp


def verify(
    logits: Tensor, q: Tensor | None, proposals: Tensor, uniforms: Tensor, params: RowParams
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Accepts a prefix of each row's proposals by the rule of its temperature, and adds the token that follows.

    Args:
      logits: float32 [B, k+1, V], the target's; k may be 0.
      q: float32 [B, k, V], as it was when the proposals were drawn; not read if every row is greedy, or k is 0.
      proposals: int64 [B, k].
      uniforms: float32 [B, k+1] in [0, 1).
    Returns: number accepted int64 [B], the token that follows int64 [B], and the served target distribution [B, k+1, V]
    (None if every row is greedy).
    """
    if not params.any_sampled:
        return *verify_greedy(logits.argmax(-1), proposals), None
    p = warp(logits, params)
    if q is None:
        n_accepted, final = torch.zeros_like(proposals[:, :0].sum(1)), inverse_cdf(p[:, 0], uniforms[:, 0])
    else:
        n_accepted, final = verify_sampled(p, q, proposals, uniforms)
    if params.any_greedy:
        n_greedy, final_greedy = verify_greedy(logits.argmax(-1), proposals)
        n_accepted = torch.where(params.greedy, n_greedy, n_accepted)
        final = torch.where(params.greedy, final_greedy, final)
    return n_accepted, final, p


def verify_sampled(p: Tensor, q: Tensor, proposals: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Accepts a prefix of the proposals and draws one more token, so that what is emitted follows p exactly.

    Proposal d_i is accepted with probability min(1, p_i(d_i) / q_i(d_i)); after the first rejection the next token is
    drawn from the residual max(0, p_i - q_i), after k acceptances (the bonus) from p_{k+1}.

    Args:
      p: float32 [B, k+1, V], row i judges proposal i; row k gives the bonus token.
      q: float32 [B, k, V], as it was when the proposals were drawn.
      proposals: int64 [B, k].
      uniforms: float32 [B, k+1] in [0, 1): k accept tests, then the draw of the last token.
    Returns: number accepted int64 [B] in 0..k, and the token that follows them int64 [B].
    """
    k = proposals.shape[1]
    picked = proposals[..., None]
    p_picked, q_picked = p[:, :k].gather(2, picked).squeeze(2), q.gather(2, picked).squeeze(2)
    # Strictly below: u * q < p is never true where p is 0, and always where p >= q > 0.
    n_accepted = (uniforms[:, :k] * q_picked < p_picked).long().cumprod(1).sum(1)
    rows = torch.arange(p.shape[0], device=p.device)
    p_next = p[rows, n_accepted]
    q_next = q[rows, n_accepted.clamp(max=k - 1)] * (n_accepted < k)[:, None]
    residual = (p_next - q_next).clamp_(min=0.0)
    # p = q up to rounding leaves nothing over; a rejection then was rounding as well, and p itself is right.
    residual = torch.where(residual.sum(1, keepdim=True) > 0.0, residual, p_next)
    return n_accepted, inverse_cdf(residual, uniforms[:, k])


def verify_greedy(best: Tensor, proposals: Tensor) -> tuple[Tensor, Tensor]:
    """Temperature 0: a proposal is accepted if it is the target's most likely token, which follows in any case.

    Args:
      best: int64 [B, k+1], the target's most likely token at each position.
      proposals: int64 [B, k].
    Returns: number accepted int64 [B] in 0..k, and the token that follows them int64 [B].
    """
    n_accepted = (best[:, :-1] == proposals).long().cumprod(1).sum(1)
    return n_accepted, best.gather(1, n_accepted[:, None]).squeeze(1)
