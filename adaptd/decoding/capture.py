"""What a round leaves on the host: one packed row of 32-bit words a request, and the Trace they add up to.

A round makes exactly one device-to-host copy: tokens, number accepted and, with capture on, everything a Trace wants.
Floats travel as their bits. Rows are only collected while a request runs; they become arrays once, when it ends, with
no loop over tokens. The index convention is that of `buffers.trace`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from adaptd.decoding.request import DecodeRequest
from adaptd.decoding.sampling import RowParams
from adaptd.models.compiled import kernels
from buffers.trace import NO_TOKEN, Branches, Source, Trace, is_reserved
from policies.surprise import PRIORITY_FLOOR, surprise_ratio
from policies.tail import draw_tail

Words = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class CaptureConfig:
    """What to keep of each verification.

    Raises: ValueError: a value is out of range.
    """

    k_top: int = 32
    """Target candidates kept a position, K."""
    k_tail: int = 0
    """Draws of the target's other tokens at each position kept, S, and behind each branch token where K'' is K; 0: none."""
    k_draft: int = 8
    """Draft candidates kept a correction, K'."""
    k_branch: int = 32
    """Target candidates kept behind each token of a branch, K'', at most `k_top`; 0: no branches. Needs `positions` all."""
    alternatives: int = 0
    """Other tokens at each position behind which an idle decoder asks the target, `k_branch` candidates each; 0: none."""
    positions: Literal["all", "rejected"] = "all"
    """Target candidates at every response position, or at corrections only."""
    max_tokens: int = 1024
    """Tokens a trace keeps; longer ones are cut on the left."""
    reserved_share: float = 0.05
    """Share of the requests kept for the gate."""
    target_id: str = ""
    """Revision of the target, as written into traces."""
    engine: str = "native"
    """Name of this engine, as written into traces."""

    def __post_init__(self) -> None:
        for name, least in (
            ("k_top", 1),
            ("k_tail", 0),
            ("k_draft", 1),
            ("k_branch", 0),
            ("alternatives", 0),
            ("max_tokens", 2),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least {least}")
        if self.positions not in ("all", "rejected"):
            raise ValueError(f"positions ({self.positions!r}) must be 'all' or 'rejected'")
        if not 0.0 <= self.reserved_share <= 1.0:
            raise ValueError(f"reserved_share ({self.reserved_share}) must lie in [0, 1]")


@dataclass(frozen=True, slots=True)
class Round:
    """One round on the device, B rows. Logits and distributions are as they were when this round ran."""

    target_logits: Tensor
    """float32 [B, k+1, V]."""
    draft_logits: Tensor | None
    """float32 [B, k, V]; None if k is 0."""
    p: Tensor | None
    """float32 [B, k+1, V], the served target distribution; None if every row is greedy."""
    proposals: Tensor
    """int64 [B, k]."""
    n_accepted: Tensor
    """int64 [B]."""
    tokens: Tensor
    """int64 [B, k+1]: the accepted prefix, then the token that followed it; what is behind is meaningless."""


class RoundPacker:
    """Packs rounds into int32 words [B, width] and unpacks the words of one request into a Trace.

    A round of fewer than k proposals is packed as it is and spread over the fields of a full one on the host.

    Args:
      k: most proposals of a round.
      vocab_size: tokens that target and draft both have.
      config: what to keep; None: tokens alone.
      compiled: rounds are on a CPU, and one call of compiled code is to pack them (`adaptd.models.compiled`).
    """

    def __init__(self, k: int, vocab_size: int, config: CaptureConfig | None, *, compiled: bool = True) -> None:
        self.k, self.config = k, config
        self._compiled = compiled and config is not None and kernels() is not None
        if config is not None:
            self.k_top, self.k_draft = min(config.k_top, vocab_size), min(config.k_draft, vocab_size)
            self.k_branch = min(config.k_branch, self.k_top) if config.positions == "all" else 0
            self.k_tail = config.k_tail if self.k_top < vocab_size else 0
            # Of its own, where logits are: what is captured must not move what a request is answered.
            self._offsets: torch.Generator | None = None
        self._layouts = [self._layout(length) for length in range(k + 1)]
        self._at = self._layouts[k]
        self.width = list(self._at.values())[-1].stop

    def _layout(self, k: int) -> dict[str, slice]:
        """Where the fields of a round of k proposals lie."""
        sizes = {"tokens": k + 1, "n_accepted": 1}
        if self.config is not None:
            judged = k + 1 if self.config.positions == "all" else 1
            best = self.k_top * judged
            believed = self.k_draft if k else 0
            sizes |= {"proposals": k, "target_logprob": k + 1, "draft_logprob": k}
            sizes |= {"topk_ids": best, "topk_logprobs": best, "tail_ids": self.k_tail * judged}
            sizes |= {"draft_topk_ids": believed, "draft_topk_logprobs": believed}
        stops = np.cumsum(list(sizes.values())).tolist()
        return {name: slice(stop - size, stop) for (name, size), stop in zip(sizes.items(), stops, strict=True)}

    def pack(self, played: Round, params: RowParams, observe: bool) -> Words:
        """The round on the host, [B, width], or [B, k+2] if there is nothing to observe. The only copy of a round."""
        watched = self.config is not None and observe
        if watched and self._compiled:
            found = self._words(played, params)
        else:
            found = torch.cat((played.tokens, played.n_accepted[:, None]), dim=1).int()
            if watched:
                found = torch.cat((found, *self._observe(played, params)), dim=1)
        words: Words = found.cpu().numpy()
        drafted = played.proposals.shape[1]
        return words if drafted == self.k else self._spread(words, drafted)

    def _spread(self, words: Words, drafted: int) -> Words:
        """The words of a short round in the fields of a full one; what it has not is 0."""
        layout = self._layouts[drafted]
        observed = words.shape[1] > layout["n_accepted"].stop
        wide = np.zeros((len(words), self.width if observed else self._at["n_accepted"].stop), np.int32)
        for name, short in layout.items():
            if short.stop <= words.shape[1]:
                start = self._at[name].start
                wide[:, start : start + short.stop - short.start] = words[:, short]
        return wide

    def _words(self, played: Round, params: RowParams) -> Tensor:
        """As tokens and `_observe` together, int32 [B, *], by one call of compiled code."""
        everywhere = self.config is not None and self.config.positions == "all"
        found: Tensor = torch.ops.adaptd.round_words.default(
            *(played.tokens, played.n_accepted, played.proposals, played.target_logits, played.draft_logits, played.p),
            *(params.greedy, self._offset(played.target_logits), self.k_top, self.k_tail, self.k_draft, everywhere),
        )
        return found

    def _offset(self, target: Tensor) -> Tensor | None:
        """What places the draws at each position, [B, k+1] in [0, 1); None if there are none."""
        if not self.k_tail:
            return None
        if self._offsets is None:
            self._offsets = torch.Generator(target.device).manual_seed(0)
        return torch.rand(target.shape[:2], generator=self._offsets, device=target.device)

    def _observe(self, played: Round, params: RowParams) -> list[Tensor]:
        """The capture's columns in the order of their fields, int32 [B, *]."""
        rows = torch.arange(played.tokens.shape[0], device=played.tokens.device)
        # Row of the rejected proposal; where all were accepted, the last one stands in and is not read.
        k = played.proposals.shape[1]
        at = played.n_accepted.clamp(max=max(0, k - 1))
        target = played.target_logits
        target_mass = target.logsumexp(-1)
        emitted = played.tokens[..., None]
        served = target.gather(2, emitted).squeeze(2) - target_mass
        if played.p is not None:
            warped = played.p.gather(2, emitted).squeeze(2).log()
            served = torch.where(params.greedy[:, None], served, warped) if params.any_greedy else warped
        offset = self._offset(target)
        if self.config is not None and self.config.positions == "rejected":
            target, target_mass = target[rows, at][:, None], target_mass[rows, at][:, None]
            offset = None if offset is None else offset[rows, at][:, None]
        best = target.topk(self.k_top, dim=-1)
        judged = [best.indices.flatten(1).int(), _bits((best.values - target_mass[..., None]).flatten(1))]
        if offset is not None:
            judged.append(draw_tail(target, best.indices, self.k_tail, offset).flatten(1).int())
        draft = played.draft_logits
        if draft is None:
            return [_bits(served), *judged]
        draft_mass = draft.logsumexp(-1)
        proposed = draft.gather(2, emitted[:, :k]).squeeze(2) - draft_mass
        believed = draft[rows, at].topk(self.k_draft, dim=-1)
        return [
            played.proposals.int(),
            _bits(served),
            _bits(proposed),
            *judged,
            believed.indices.int(),
            _bits(believed.values - draft_mass[rows, at][:, None]),
        ]

    def assemble(
        self,
        request: DecodeRequest,
        tokens: Sequence[int],
        rounds: Sequence[Words],
        drafted: Sequence[int],
        draft_version: int,
        created_at: float,
    ) -> Trace:
        """The trace of a finished request.

        Args:
          request: what was asked.
          tokens: prompt and the R response tokens really emitted; later positions of the last round are cut.
          rounds: the request's words, [width] a round, in order.
          drafted: proposals of each round.
          draft_version: version to name as proposer.
          created_at: unix seconds.
        Raises: RuntimeError: this packer does not capture.
        """
        config = self.config
        if config is None:
            raise RuntimeError("assemble needs a CaptureConfig; this decoder was built with capture=None")
        k, words, lengths = self.k, np.stack(rounds), np.asarray(drafted)[:, None]
        prompt_len = len(request.prompt_ids)
        size = len(tokens) - prompt_len
        n_accepted = words[:, self._at["n_accepted"]]
        column = np.arange(k + 1)
        valid = column <= n_accepted
        last = column == n_accepted
        corrected = last & (n_accepted < lengths)
        source = np.where(last, np.where(corrected, Source.CORRECTION, Source.BONUS), Source.ACCEPTED)
        proposals = words[:, self._at["proposals"]]
        rejected = np.where(corrected, np.pad(proposals, ((0, 0), (0, 1))), NO_TOKEN)
        draft_logprob = np.full(valid.shape, np.nan, np.float32)
        draft_logprob[:, :k] = np.where(column[:k] < lengths, self._floats(words, "draft_logprob"), np.nan)
        # Rounds that end in a correction, and where; the end of the answer may have cut the last one off.
        is_correction = corrected[valid][:size]
        rejected_at = np.flatnonzero(is_correction)
        rounds_kept = np.flatnonzero(corrected.any(1))[: len(rejected_at)]
        topk_ids, topk_logprobs = words[:, self._at["topk_ids"]], self._floats(words, "topk_logprobs")
        tail_ids = words[:, self._at["tail_ids"]]
        reserved = is_reserved(request.request_id, config.reserved_share)
        # What is reserved is never learned from.
        drawn, branches = self.k_tail > 0 and not reserved, None
        if config.positions == "all":
            shape = (len(words), k + 1, self.k_top)
            topk_ids, topk_logprobs = topk_ids.reshape(shape), topk_logprobs.reshape(shape)
            tail_ids = tail_ids.reshape(len(words), k + 1, self.k_tail)
            if self.k_branch and not reserved:
                # Behind a rejected proposal and those after it: the rows that no emitted token has used.
                unused = (column[:k] >= n_accepted) & (column[:k] < lengths)
                unused, best = unused[rounds_kept], np.s_[rounds_kept, 1:, : self.k_branch]
                # Drawn from what `k_top` leaves over; fewer candidates leave over more.
                behind = tail_ids[rounds_kept, 1:][unused] if drawn and self.k_branch == self.k_top else None
                branches = Branches(
                    at=rejected_at.astype(np.int32),
                    lens=unused.sum(1).astype(np.uint8),
                    tokens=proposals[rounds_kept][unused].astype(np.uint32),
                    topk_ids=topk_ids[best][unused].astype(np.uint32),
                    topk_logprobs=topk_logprobs[best][unused].astype(np.float16),
                    tail_ids=None if behind is None else behind.astype(np.uint32),
                )
            topk_ids, topk_logprobs = topk_ids[valid][:size], topk_logprobs[valid][:size]
            tail_ids = tail_ids[valid][:size]
        else:
            topk_ids, topk_logprobs = topk_ids[rounds_kept], topk_logprobs[rounds_kept]
            tail_ids = tail_ids[rounds_kept]
        q_emitted = draft_logprob[valid][:size]
        q_best = self._floats(words, "draft_topk_logprobs")[rounds_kept]
        sources = source[valid][:size]
        params = request.params
        trace = Trace(
            tokens=np.asarray(tokens, np.uint32),
            prompt_len=prompt_len,
            topk_ids=topk_ids.astype(np.uint32),
            topk_logprobs=topk_logprobs.astype(np.float16),
            tail_ids=tail_ids.astype(np.uint32) if drawn else None,
            source=sources.astype(np.uint8),
            rejected=rejected[valid][:size].astype(np.int32),
            draft_logprob=_half(q_emitted),
            target_logprob=_half(self._floats(words, "target_logprob")[valid][:size]),
            rejected_at=rejected_at.astype(np.int32),
            draft_topk_ids=words[rounds_kept, self._at["draft_topk_ids"]].astype(np.uint32),
            draft_topk_logprobs=_half(q_best),
            request_id=request.request_id,
            target_id=config.target_id,
            draft_version=draft_version,
            domain=request.domain,
            tenant=request.tenant,
            created_at=created_at,
            temperature=params.temperature,
            engine=config.engine,
            reserved=reserved,
            top_p=params.top_p,
            top_k=params.top_k,
            surprise=surprise_seed(int((sources == Source.ACCEPTED).sum()), q_emitted[rejected_at], q_best),
            branches=branches,
        )
        return trace.truncate_left(config.max_tokens)

    def _floats(self, words: Words, name: str) -> npt.NDArray[np.float32]:
        return np.ascontiguousarray(words[:, self._at[name]]).view(np.float32)


def surprise_seed(n_accepted: int, q_emitted: npt.NDArray[Any], q_best: npt.NDArray[Any]) -> float:
    """A trace's first priority: 1 less the mean of min(1, SurpriseRatio) over the positions the draft was judged at.

    An accepted proposal counts as 1: the draft had proposed it, so it was among its favourites, and the draft's other
    candidates there are not captured. Bonus tokens were not judged.

    Args:
      n_accepted: accepted positions.
      q_emitted: float [C], log q of the target's token at each correction, nats.
      q_best: float [C, K'], the draft's best log-probabilities there, nats.
    Returns: within [PRIORITY_FLOOR, 1], high where the target surprised the draft; 1 if nothing was judged.
    """
    judged = n_accepted + len(q_emitted)
    if judged == 0:
        return 1.0
    ratios = surprise_ratio(q_emitted, q_best) if len(q_emitted) else np.zeros(0)
    return max(PRIORITY_FLOOR, 1.0 - float((n_accepted + np.minimum(ratios, 1.0).sum()) / judged))


def _bits(values: Tensor) -> Tensor:
    """float32 as the int32 with the same bits."""
    return values.float().contiguous().view(torch.int32)


def _half(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float16]:
    """float16; what is too small to be represented becomes the smallest finite number, NaN stays."""
    return np.maximum(values, np.float32(np.finfo(np.float16).min)).astype(np.float16)
