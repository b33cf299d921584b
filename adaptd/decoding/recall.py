"""Recall beside the draft in one decoder: mixed into each proposal, weighed by each verification, fed by each answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from adaptd.decoding.row import Row
from adaptd.decoding.sampling import RowParams, inverse_cdf, warp
from adaptd.models.compiled import kernels
from buffers.trace import Trace
from policies.recall import Recall, Recalled
from policies.warp import truncate


class Asked(NamedTuple):
    """What a round asks of the recall, B rows."""

    n: Tensor
    """int64 [B], tokens of each row."""
    history: Tensor
    """int64 [B, L], the tokens; proposals are written behind them."""
    slots: Tensor
    """int64 [B], whose weights to use."""
    mixed: Tensor
    """bool [B], whether anything is mixed into the row's proposals."""

    def filled(self, rows: int) -> list[Tensor]:
        """The same with rows that know nothing behind them; the first ones' tokens are a copy."""
        more = rows - len(self.n)
        history = pad(self.history, (0, 0, 0, more)) if more else self.history.clone()
        return [pad(self.n, (0, more), value=1), history, pad(self.slots, (0, more)), pad(self.mixed, (0, more))]


class RecallRound:
    """What one round of B rows asks of a `Recall`. Owned by the decoder's thread.

    Args:
      recall: shared by all rows of the decoder.
      capacity: longest row with its proposals, in tokens.
      compiled: whether compiled code may look (`adaptd.models.compiled`).
    """

    def __init__(self, recall: Recall, capacity: int, device: torch.device, *, compiled: bool = False) -> None:
        self.recall = recall
        self._look = compiled_look(recall) if compiled and kernels() is not None else recall.look
        self._capacity, self._device = capacity, device
        self._history: Tensor
        self._slots: Tensor
        self._mixed: Tensor

    def start(self, rows: Sequence[Row]) -> None:
        """The rows that play from now on."""
        self._history = torch.zeros(len(rows), self._capacity, dtype=torch.int64)
        for at, row in enumerate(rows):
            self._history[at, : len(row.tokens)] = torch.tensor(row.tokens)
        self._history = self._history.to(self._device)
        slots = [self.recall.slot(row.request.domain) for row in rows]
        # What is drawn for a seed must not depend on what others asked; the most likely token never does.
        mixed = [self.recall.seeded or p.seed is None or p.greedy for p in (row.request.params for row in rows)]
        self._slots = torch.tensor(slots, device=self._device)
        self._mixed = torch.tensor(mixed, device=self._device)

    def asked(self, n: Tensor) -> Asked:
        """For proposals behind the first n [B] tokens of each row."""
        return Asked(n, self._history, self._slots, self._mixed)

    def propose(
        self, asked: Asked, depth: int, logits: Tensor, params: RowParams, uniforms: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Recalled]:
        """Draws the next proposal of each row from the draft's distribution with what is recalled mixed in.

        Args:
          depth: proposals of this round before it.
          logits: float32 [B, V], the draft's.
          uniforms: float32 [B] in [0, 1).
        Returns: tokens int64 [B], the distribution they were drawn from [B, V], the draft's own [B, V], and what was recalled.
        """
        at = asked.n + depth
        own = warp(logits, params) if params.any_sampled else None
        if own is None or params.any_greedy:
            sure = torch.zeros_like(logits).scatter_(1, logits.argmax(-1, keepdim=True), 1.0)
            own = sure if own is None else torch.where(params.greedy[:, None], sure, own)
        found = self._look(asked.history, at, asked.slots)
        found = replace(found, weights=found.weights * asked.mixed[:, None])
        mixed = self.recall.mix(own, found)
        tokens = inverse_cdf(mixed, uniforms) if params.any_sampled else mixed.argmax(-1)
        if params.any_sampled and params.any_greedy:
            tokens = torch.where(params.greedy, mixed.argmax(-1), tokens)
        asked.history.scatter_(1, at[:, None], tokens[:, None])
        return tokens, mixed, own, found

    def settle(
        self,
        n: Tensor,
        p: Tensor | None,
        tokens: Tensor,
        n_accepted: Tensor,
        params: RowParams,
        own: Tensor | None,
        recalled: Recalled | None,
    ) -> None:
        """Weighs the sources by what was emitted, and closes the round.

        Args:
          n: int64 [B], tokens of each row before this round.
          p: float32 [B, k+1, V], the served target distribution; None if every row is greedy.
          tokens: int64 [B, k+1], the accepted prefix and the token after it; what is behind is not read. k may be 0.
          n_accepted: int64 [B].
          own, recalled: as `Proposals` has them; None if k is 0.
        """
        k = tokens.shape[1] - 1
        # What lies behind the token after the accepted ones is not read before it is written again.
        self._history.scatter_(1, n[:, None] + torch.arange(k + 1, device=tokens.device), tokens)
        if own is None or recalled is None:
            return
        emitted = tokens[:, :k, None]
        drafted = own.gather(2, emitted)[..., 0]
        served = torch.ones_like(drafted)
        if p is not None:
            served = torch.where(params.greedy[:, None], served, p[:, :k].gather(2, emitted)[..., 0])
        reached = torch.arange(k, device=tokens.device) <= n_accepted[:, None]
        parts = (getattr(recalled, name).flatten(0, 1) for name in Recalled.__slots__)
        self.recall.learn(
            Recalled(*parts), drafted.flatten(), served.flatten(), tokens[:, :k].flatten(), reached.flatten()
        )


def compiled_look(recall: Recall) -> Callable[[Tensor, Tensor, Tensor], Recalled]:
    """`recall.look` on a CPU as one call of compiled code; needs `kernels`. It is some ninety operations."""
    tensors, *about = recall.looked_at

    def look(history: Tensor, length: Tensor, slots: Tensor) -> Recalled:
        return Recalled(*torch.ops.adaptd.recall_look.default(history, length, slots, *tensors, *about))

    return look


def observe_trace(recall: Recall, trace: Trace) -> None:
    """Keeps the distributions of one answer as they were served: at its temperature, top-k and top-p."""
    device = recall.device
    length = torch.from_numpy(trace.prompt_len + trace.judged_at).to(device)
    probs = captured_probs(trace, device)
    ids = torch.from_numpy(trace.topk_ids.astype("int64")).to(device)
    history = torch.from_numpy(trace.tokens.astype("int64")).to(device)
    recall.observe(history.expand(len(length), -1), length, ids, probs)


def captured_probs(trace: Trace, device: torch.device) -> Tensor:
    """The captured tokens' probabilities as they were served, at temperature, top-k and top-p; rows sum to 1: float32 [P, K]."""
    logprobs = torch.from_numpy(trace.topk_logprobs).to(device).float()
    if trace.temperature == 0:
        return nn.functional.one_hot(logprobs.argmax(-1), logprobs.shape[-1]).float()
    probs = (logprobs / trace.temperature).softmax(-1)
    if trace.top_k <= 0 and trace.top_p >= 1.0:
        return probs
    rows, kept = probs.shape
    top_k = torch.full((rows,), min(trace.top_k, kept) if trace.top_k > 0 else kept, device=device)
    return truncate(probs, top_k, torch.full((rows,), trace.top_p if trace.top_p < 1.0 else 2.0, device=device))
