"""Branches in a training batch: what the target was asked beside an answer, read in the same forward pass as the answer.

A row's branches stand behind its answer. Each token sees the text in front of its branch and its branch up to itself,
nothing of the other branches (tree attention, as in Miao et al. 2024, SpecInfer), so a branch costs its own tokens alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from adaptd.models.cache import FULL, GROUPED_SDPA
from buffers.trace import NO_TOKEN, Trace

#: Steps of this share of a turn visit any number of branches evenly, however many are taken (golden-ratio sequence).
_GOLDEN = 0.6180339887498949
#: Where the turn begins, from one step of the learner to the next: it comes back to nothing that it has taken.
_NEXT = 0.41421356237309515


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the tokens of rows stand, and what they see."""

    position: Tensor
    """[B, T] int64, place in its text."""
    fork: Tensor
    """[B, T] int64, columns of the answer's row that a branch token sees; 0 for the answer itself."""
    branch: Tensor
    """[B, T] int64, number of the branch in its row, from 1; 0 for the answer."""

    def rows(self, chosen: Sequence[int], width: int) -> Layout:
        """Some of the rows, cut to `width` tokens."""
        return Layout(*(t[list(chosen), :width] for t in (self.position, self.fork, self.branch)))

    def visible(self, columns: Tensor) -> Tensor:
        """Which of the tokens at `columns` [B, Q] each of them sees: bool [B, Q, Q]."""
        fork, branch = self.fork.gather(1, columns), self.branch.gather(1, columns)
        place = torch.arange(columns.shape[1], device=columns.device)
        own = (branch[:, :, None] == branch[:, None, :]) & (place[:, None] >= place)
        return own | (branch[:, None, :] == 0) & (columns[:, None, :] < fork[:, :, None])


@dataclass(frozen=True, slots=True)
class BranchRows:
    """U positions that the answers do not have."""

    layout: Layout
    row: Tensor
    """[U] int64, trace of each."""
    column: Tensor
    """[U] int64, the logits row of each: that of the branch token in front of it."""
    topk_ids: Tensor
    """[U, K''] int64, the target's most likely tokens."""
    topk_logprobs: Tensor
    """[U, K''] float32 nats, descending, temperature 1."""
    tail_ids: Tensor
    """[U, S'] int64, draws of the target's other tokens; NO_TOKEN where a trace has fewer."""


def reads_branches(model: PreTrainedModel) -> bool:
    """Whether a model's attention takes a mask of who sees whom: not where it has a window or a kernel of its own."""
    config = model.config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None)
    windowed = any(kind != FULL for kind in kinds) if kinds else getattr(config, "sliding_window", None) is not None
    return not windowed and getattr(config, "_attn_implementation", "") in ("sdpa", "eager", GROUPED_SDPA)


@dataclass(frozen=True, slots=True)
class Choice:
    """Which branches of each trace are read: a share of them, spread over the answer, other ones in each step."""

    share: float = 1.0
    step: int = 0

    def order(self, n: int) -> NDArray[np.int64]:
        """Those taken of n, in an order whose every beginning is spread over them."""
        place = (np.arange(n) * _GOLDEN + self.step * _NEXT) % 1
        order = np.argsort(place)
        taken: NDArray[np.int64] = order[place[order] < self.share]
        return taken


def append_branches(
    ids: NDArray[np.int64],
    traces: Sequence[Trace],
    cuts: Sequence[int],
    max_tokens: int,
    device: torch.device | str,
    choice: Choice,
) -> tuple[NDArray[np.int64], list[int], BranchRows | None]:
    """Put the branches of traces behind their answers.

    Args:
      ids: [B, T], the answers, padded on the right.
      cuts: tokens that each trace has lost on the left; a branch whose text is gone goes too.
      max_tokens: of all branches of one trace; where there are more, as many as fit, evenly taken.
      choice: which are wanted.
    Returns: tokens [B, T'], branch tokens of each trace, and where they stand; None if there are none.
    """
    parts = [_of_trace(trace, cut, max_tokens, choice) for trace, cut in zip(traces, cuts, strict=True)]
    counts = [len(part.token) for part in parts]
    if not any(counts):
        return ids, counts, None
    ends = [len(trace.tokens) - cut for trace, cut in zip(traces, cuts, strict=True)]
    width = max(end + count for end, count in zip(ends, counts, strict=True))
    wide = np.zeros((len(ids), max(width, ids.shape[1])), np.int64)
    wide[:, : ids.shape[1]] = ids
    position = np.tile(np.arange(wide.shape[1]), (len(ids), 1))
    fork, branch = np.zeros_like(wide), np.zeros_like(wide)
    for i, (end, part) in enumerate(zip(ends, parts, strict=True)):
        place = slice(end, end + len(part.token))
        wide[i, place], fork[i, place], branch[i, place] = part.token, part.fork, part.number
        position[i, place] = part.fork + part.within
    some = [part for part in parts if len(part.token)]
    depth = min(part.topk_ids.shape[1] for part in some)

    def tensor(arrays: Sequence[NDArray[Any]], dtype: type) -> Tensor:
        return torch.from_numpy(np.concatenate(arrays).astype(dtype)).to(device)

    layout = Layout(*(torch.from_numpy(a).to(device) for a in (position, fork, branch)))
    return (
        wide,
        counts,
        BranchRows(
            layout=layout,
            row=tensor([np.full(n, i) for i, n in enumerate(counts)], np.int64),
            column=tensor([end + np.arange(n) for end, n in zip(ends, counts, strict=True)], np.int64),
            topk_ids=tensor([part.topk_ids[:, :depth] for part in some], np.int64),
            topk_logprobs=tensor([part.topk_logprobs[:, :depth] for part in some], np.float32),
            tail_ids=tensor(
                padded([draws(part, depth) for part in some], [len(part.token) for part in some]), np.int64
            ),
        ),
    )


class _Scored(Protocol):
    @property
    def topk_ids(self) -> NDArray[np.uint32]: ...

    @property
    def tail_ids(self) -> NDArray[np.uint32] | None: ...


def draws(scored: _Scored, depth: int, kept: NDArray[np.bool_] | slice = slice(None)) -> NDArray[np.uint32] | None:
    """The draws of these rows; None if there are none, or if `depth` leaves over more tokens than they were drawn from."""
    if scored.tail_ids is None or scored.topk_ids.shape[1] != depth:
        return None
    return scored.tail_ids[kept]


def padded(parts: Sequence[NDArray[np.uint32] | None], rows: Sequence[int]) -> list[NDArray[np.int64]]:
    """Draws of several traces, of `rows` rows each, with NO_TOKEN where one has fewer a row than another."""
    width = max((part.shape[1] for part in parts if part is not None), default=0)
    found = [np.full((n, width), NO_TOKEN, np.int64) for n in rows]
    for wide, part in zip(found, parts, strict=True):
        if part is not None:
            wide[:, : part.shape[1]] = part
    return found


class _Part(NamedTuple):
    """The n branch tokens of one trace that are taken."""

    token: NDArray[np.uint32]
    fork: NDArray[np.int64]
    within: NDArray[np.int64]
    """Place in its branch."""
    number: NDArray[np.int64]
    """Of its branch, from 1."""
    topk_ids: NDArray[np.uint32]
    topk_logprobs: NDArray[np.float16]
    tail_ids: NDArray[np.uint32] | None = None


_NONE = np.zeros(0, np.int64)
_NOTHING = _Part(
    _NONE.astype(np.uint32), _NONE, _NONE, _NONE, np.zeros((0, 0), np.uint32), np.zeros((0, 0), np.float16)
)


def _of_trace(trace: Trace, cut: int, max_tokens: int, choice: Choice) -> _Part:
    if trace.branches is None:
        return _NOTHING
    lens = trace.branches.lens.astype(np.int64)
    fork = trace.prompt_len + trace.branches.at.astype(np.int64) - cut
    order = choice.order(len(lens))
    order = order[(fork[order] > 0) & (lens[order] > 0)]
    taken = np.zeros(len(lens), bool)
    taken[order[np.cumsum(lens[order]) <= max_tokens]] = True
    kept, lens = trace.branches.take(taken), lens[taken]
    return _Part(
        token=kept.tokens,
        fork=np.repeat(fork[taken], lens),
        within=np.arange(len(kept.tokens)) - np.repeat(np.cumsum(lens) - lens, lens),
        number=np.repeat(np.arange(1, len(lens) + 1), lens),
        topk_ids=kept.topk_ids,
        topk_logprobs=kept.topk_logprobs,
        tail_ids=kept.tail_ids,
    )
