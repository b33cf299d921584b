"""Alternatives: other tokens that the target might have said at each position of an answer, and what it would say behind them.

A draft is right as often as it knows the target where the target goes, and an answer shows one way of many. What follows
the tokens that were nearly said is to be had for one position each, since the target's cache still holds the answer in
front of them: no prompt is read and nothing is decoded. It is asked while nobody is here (`adaptd.decoding.idle`), in passes
of half a round at most, so that a request that comes hardly waits.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from adaptd.decoding.prefill import PASS, Prefill
from adaptd.decoding.runner import ModelRunner
from adaptd.models.cache import FULL, additive, round_up
from buffers.trace import Branches, Trace
from policies.tail import captured_draws

#: Rarer tokens are left out: where the target is sure there is nothing to ask.
_LEAST_PROBABILITY = 0.01
#: Most alternatives of one pass: a row of logits each.
_MOST = 128


def draw_alternatives(trace: Trace, n: int, rng: np.random.Generator) -> tuple[NDArray[np.int32], NDArray[np.uint32]]:
    """Up to `n` tokens at each response position that were not emitted there, all different, none rarer than one in a hundred.

    Drawn without replacement in proportion to what the target gave them at the trace's temperature (1 for a greedy one), by
    the largest of log p + Gumbel noise (Kool et al. 2019, "Stochastic beams and where to find them", section 2.3).

    Args:
      trace: with every position captured.
    Returns: the response position of each alternative, ascending, and its token, [F].
    """
    logits = trace.topk_logprobs.astype(np.float64) / (trace.temperature or 1.0)
    rare = logits < np.log(_LEAST_PROBABILITY) + np.logaddexp.reduce(logits, axis=1, keepdims=True)
    drawn = logits + rng.gumbel(size=logits.shape)
    drawn[rare | (trace.topk_ids == trace.response[:, None])] = -np.inf
    best = np.argsort(-drawn, axis=1)[:, :n]
    there = np.isfinite(np.take_along_axis(drawn, best, 1))
    at, tokens = np.broadcast_to(np.arange(len(best))[:, None], best.shape), np.take_along_axis(trace.topk_ids, best, 1)
    return at[there].astype(np.int32), tokens[there].astype(np.uint32)


def branches_of(
    at: NDArray[np.int32],
    tokens: NDArray[np.uint32],
    ids: NDArray[Any],
    logprobs: NDArray[Any],
    drawn: NDArray[np.uint32] | None = None,
) -> Branches:
    """Alternatives as branches of one token, with the target's candidates [F, K''] and draws [F, S'] behind each."""
    one = np.ones(len(at), np.uint8)
    return Branches(at, one, tokens, ids.astype(np.uint32), logprobs.astype(np.float16), drawn)


@dataclass(slots=True)
class Asking:
    """A trace whose alternatives the target is being asked about."""

    trace: Trace
    at: NDArray[np.int32]
    """[F] response position of each."""
    tokens: NDArray[np.uint32]
    """[F]."""
    ids: list[NDArray[Any]] = field(default_factory=list)
    """The target's most likely tokens behind those that it was asked about already, [*, K''] a pass."""
    logprobs: list[NDArray[Any]] = field(default_factory=list)
    drawn: list[NDArray[np.uint32]] = field(default_factory=list)
    """Draws of its other tokens, [*, S'] a pass; empty if there are none."""

    @property
    def done(self) -> int:
        """Alternatives that the target was asked about."""
        return sum(map(len, self.ids))

    def answered(self) -> Trace:
        """The trace with what the target said so far; itself if that is nothing."""
        n = self.done
        if not n:
            return self.trace
        ids, logprobs = np.concatenate(self.ids), np.concatenate(self.logprobs)
        drawn = np.concatenate(self.drawn) if self.drawn else None
        return self.trace.beside(branches_of(self.at[:n], self.tokens[:n], ids, logprobs, drawn))


class AlternativesReader:
    """Asks the target about alternatives, beside an answer in its cache.

    Args:
      target: its slots must be free.
      prefill: knows what the slots hold, and reads what they do not.
      n: alternatives at each position.
      k_branch: candidates kept behind each.
      k_tail: draws of the other tokens behind each; 0: none.
      rng: draws them.
    """

    def __init__(
        self, target: ModelRunner, prefill: Prefill, *, n: int, k_branch: int, rng: np.random.Generator, k_tail: int = 0
    ) -> None:
        self._target, self._prefill = target, prefill
        self._n, self._k_branch, self._k_tail, self._rng = n, k_branch, k_tail, rng
        # A window is a matter of places, and an alternative stands behind others in the cache.
        self._able = n > 0 and k_branch > 0 and prefill.reuses and set(target.windows) == {FULL}

    def begin(self, trace: Trace) -> Asking | None:
        """What there is to ask about a trace; None: nothing, or this target cannot be asked."""
        if not self._able or trace.reserved or len(trace.topk_ids) != trace.response_len:
            return None
        at, tokens = draw_alternatives(trace, self._n, self._rng)
        return Asking(trace, at, tokens) if len(at) else None

    @torch.inference_mode()
    def step(self, asking: Asking) -> bool:
        """One pass of the target: over what its cache lacks of the answer, or over alternatives. Whether that was the last."""
        text = asking.trace.tokens[:-1].tolist()
        slot, missing = self._prefill.fetch(text)
        if missing:
            return False
        start, device = asking.done, self._target.device
        stop = min(
            len(asking.at), start + min(_MOST, self._prefill.short_chunk(PASS), self._target.cache.capacity - len(text))
        )
        columns = torch.arange(len(text), len(text) + stop - start, device=device)[None]
        place = asking.trace.prompt_len + asking.at[start:stop].astype(np.int64)
        positions = torch.from_numpy(place).to(device)[None]
        tokens = torch.from_numpy(asking.tokens[start:stop].astype(np.int64)).to(device)[None]
        length = round_up(len(text) + stop - start)
        seen = torch.arange(length, device=device)
        mask = additive((seen >= positions[:, :, None]) & (seen != columns[:, :, None]), self._target.dtype)
        (logits,) = self._target.forward(
            tokens, positions, {FULL: mask}, slot, length, last_only=False, columns=columns
        )
        best = logits.topk(min(self._k_branch, logits.shape[-1]), dim=-1)
        if (drawn := captured_draws(logits, best.indices, self._k_tail, self._rng)) is not None:
            asking.drawn.append(drawn)
        asking.ids.append(best.indices.numpy(force=True))
        asking.logprobs.append((best.values - logits.logsumexp(-1, keepdim=True)).numpy(force=True))
        return stop == len(asking.at)
