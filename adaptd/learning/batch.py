"""Traces to padded tensors: one forward over whole sequences, with the rows that carry a captured target distribution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from adaptd.learning.branches import BranchRows, Choice, Layout, append_branches, draws, padded
from adaptd.models.cache import additive
from adaptd.models.request_gate import conditioned, request_gate
from buffers.trace import Trace


@dataclass(frozen=True, slots=True)
class Batch:
    """B traces, right-padded to T tokens, with their N captured response positions flattened in trace order."""

    input_ids: Tensor
    """[B, T] int64. Causal attention makes right padding invisible to real tokens, so no mask is needed."""
    row: Tensor
    """[N] int64, trace of each position."""
    column: Tensor
    """[N] int64, the logits row that judges it (`Trace.judging_rows`)."""
    token_ids: Tensor
    """[N] int64, the token that was emitted there."""
    judged: Tensor
    """[M] int64, the positions (indices into N) whose target distribution was captured: all, or corrections only."""
    topk_ids: Tensor
    """[M, K] int64, the target's most likely tokens."""
    topk_logprobs: Tensor
    """[M, K] float32 nats, descending, temperature 1."""
    tail_ids: Tensor
    """[M, S] int64, draws of the target's other tokens; NO_TOKEN where a trace has fewer."""
    source: Tensor
    """[M] int64, how the token at each judged position came to be: codes of `buffers.trace.Source`."""
    target_logprob: Tensor
    """[N] float32 nats of the emitted token under the served target distribution; NaN where unknown."""
    lengths: tuple[int, ...]
    """Positions of each trace; sums to N."""
    widths: tuple[int, ...]
    """Tokens of each row without padding."""
    prompt_lens: tuple[int, ...]
    """Tokens of each trace's prompt that are there."""
    domains: tuple[str, ...]
    """Domain of each trace."""
    branches: BranchRows | None = None
    """What stands behind the answers in each row, if that was asked for and there is any."""

    @property
    def tokens(self) -> int:
        """Tokens of the rows, padding not counted."""
        return sum(self.widths)


def collate(
    traces: Sequence[Trace], max_tokens: int, device: torch.device | str = "cpu", *, branches: Choice | None = None
) -> Batch:
    """Pad traces to one batch; a trace longer than `max_tokens` loses tokens (and positions) on the left.

    Args:
      branches: put these of their branches behind the answers, at most `max_tokens` tokens of each trace's; None: none.

    Raises:
      ValueError: no traces.
    """
    if not traces:
        raise ValueError("traces must hold at least one trace")
    depth = min(t.topk_ids.shape[1] for t in traces)
    cuts = [max(0, len(t.tokens) - max_tokens) for t in traces]
    width = max(len(t.tokens) - cut for t, cut in zip(traces, cuts, strict=True))
    ids = np.zeros((len(traces), width), dtype=np.int64)
    rows, columns, tokens, judged, topk, logprobs, source, served = [], [], [], [], [], [], [], []
    drawn: list[NDArray[np.uint32] | None] = []
    lengths: list[int] = []
    for i, (trace, cut) in enumerate(zip(traces, cuts, strict=True)):
        kept = trace.tokens[cut:]
        ids[i, : len(kept)] = kept
        # Positions judged by a logits row that was cut away are dropped.
        first = max(0, cut + 1 - trace.prompt_len)
        column = trace.judging_rows[first:] - cut
        rows.append(np.full(len(column), i))
        columns.append(column)
        tokens.append(kept[column + 1])
        known = trace.judged_at >= first
        judged.append(trace.judged_at[known] - first + sum(lengths))
        topk.append(trace.topk_ids[known, :depth])
        logprobs.append(trace.topk_logprobs[known, :depth])
        drawn.append(draws(trace, depth, known))
        source.append(trace.source[trace.judged_at[known]])
        served.append(trace.target_logprob[first:])
        lengths.append(len(column))

    widths = [len(t.tokens) - cut for t, cut in zip(traces, cuts, strict=True)]
    behind: BranchRows | None = None
    if branches is not None:
        ids, more, behind = append_branches(ids, traces, cuts, max_tokens, device, branches)
        widths = [width + n for width, n in zip(widths, more, strict=True)]

    def tensor(parts: Sequence[np.ndarray], dtype: type) -> Tensor:
        return torch.from_numpy(np.concatenate(parts).astype(dtype)).to(device)

    return Batch(
        input_ids=torch.from_numpy(ids).to(device),
        row=tensor(rows, np.int64),
        column=tensor(columns, np.int64),
        token_ids=tensor(tokens, np.int64),
        judged=tensor(judged, np.int64),
        topk_ids=tensor(topk, np.int64),
        topk_logprobs=tensor(logprobs, np.float32),
        tail_ids=tensor(padded(drawn, [len(part) for part in topk]), np.int64),
        source=tensor(source, np.int64),
        target_logprob=tensor(served, np.float32),
        lengths=tuple(lengths),
        widths=tuple(widths),
        domains=tuple(t.domain for t in traces),
        prompt_lens=tuple(max(1, t.prompt_len - cut) for t, cut in zip(traces, cuts, strict=True)),
        branches=behind,
    )


#: Share of a batch's tokens that must be padding saved before it is worth two forward passes in the place of one.
_WORTH_SPLITTING = 0.15


def draft_logits(model: PreTrainedModel, batch: Batch, *, prompt_gradient: bool = True) -> Tensor:
    """The draft's logits at every captured position, [N, V] float32, or [N + U, V] with those of the branches behind them.

    Only those positions go through the output head, the dearest part of a small draft: a hook picks them in front of
    it, so that whatever an architecture does to logits behind its head is still done. On a CPU, where every padded
    token costs, short and long traces go separately.

    Args:
      prompt_gradient: False: what stands in front of the first captured position of a row is read first, without a
        gradient. The logits are the same; of a long prompt and a short answer a step keeps the answer's activations alone.
    """
    openness = _openness(model, batch)
    row, column, layout = batch.row, batch.column, None
    if batch.branches is not None:
        layout = batch.branches.layout
        row, column = torch.cat([row, batch.branches.row]), torch.cat([column, batch.branches.column])
    groups = _by_length(batch.widths) if batch.input_ids.device.type == "cpu" else [list(range(len(batch.widths)))]
    if len(groups) == 1:
        return _forward(model, batch.input_ids, row, column, openness, prompt_gradient, layout)
    parts, places = [], []
    for group in groups:
        place = torch.full((len(batch.widths),), -1)
        place[group] = torch.arange(len(group))
        here = torch.nonzero(place[row] >= 0)[:, 0]
        width = max(batch.widths[i] for i in group)
        rows = None if openness is None else openness[group]
        apart = None if layout is None else layout.rows(group, width)
        ids = batch.input_ids[group, :width]
        parts.append(_forward(model, ids, place[row[here]], column[here], rows, prompt_gradient, apart))
        places.append(here)
    at = torch.cat(places)
    joined = torch.cat(parts)
    return joined if bool((at.diff() > 0).all()) else joined[at.argsort()]


def _openness(model: PreTrainedModel, batch: Batch) -> Tensor | None:
    """How far the draft's request gate is open for each trace, [B, 1, 1]; None if it has none."""
    gate = request_gate(model)
    if gate is None:
        return None
    prompts = [ids[:n] for ids, n in zip(batch.input_ids, batch.prompt_lens, strict=True)]
    opened: Tensor = gate(gate.features(prompts), gate.kept(batch.domains))
    return opened


def _forward(
    model: PreTrainedModel,
    input_ids: Tensor,
    row: Tensor,
    column: Tensor,
    openness: Tensor | None,
    prompt_gradient: bool,
    layout: Layout | None,
) -> Tensor:
    with conditioned(model, openness) as gate:
        read = None if prompt_gradient else _read_prompts(model, input_ids, row, column, layout)
        read = read or _read_all(model, input_ids, column, layout)

        def pick(_head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            if openness is not None:
                gate.value = openness[row, 0][None]
            return (inputs[0][row, read.column][None],)

        handle = model.get_output_embeddings().register_forward_pre_hook(pick)
        try:
            logits: Tensor = model(input_ids=read.input_ids, **read.context).logits[0].float()
        finally:
            handle.remove()
    return logits


class _Read(NamedTuple):
    """What a forward pass still has to read."""

    input_ids: Tensor
    """[B, T]."""
    column: Tensor
    """[N], as in `Batch`, counted in these tokens."""
    context: dict[str, Any]
    """Arguments of the model: what was read already, where these tokens stand, and what they see."""


def _read_all(model: PreTrainedModel, input_ids: Tensor, column: Tensor, layout: Layout | None) -> _Read:
    if layout is None:
        return _Read(input_ids, column, {"use_cache": False})
    columns = torch.arange(input_ids.shape[1], device=input_ids.device).expand(len(input_ids), -1)
    mask = additive(~layout.visible(columns), model.dtype)
    return _Read(input_ids, column, {"use_cache": False, "attention_mask": mask, "position_ids": layout.position})


def _read_prompts(
    model: PreTrainedModel, input_ids: Tensor, row: Tensor, column: Tensor, layout: Layout | None
) -> _Read | None:
    """Read each row up to its first column; None if there is nothing to read.

    Prompts are padded on the left there, as in batched generation, so that a sliding window holds the same tokens of
    each; answers on the right.
    """
    rows, device = len(input_ids), input_ids.device
    start = torch.full((rows,), input_ids.shape[1], device=device).scatter_reduce(0, row, column, "amin")
    end = torch.zeros(rows, dtype=torch.int64, device=device).scatter_reduce(0, row, column, "amax") + 1
    start = start.minimum(end - 1)  # a row without captured positions
    longest, rest = int(start.max()), int((end - start).max())
    if longest == 0:
        return None
    place = torch.arange(longest, device=device) - (longest - start)[:, None]
    known = place >= 0
    with torch.no_grad():
        past = model.base_model(
            input_ids=input_ids.gather(1, place.clamp(min=0)),
            attention_mask=known.long(),
            position_ids=place.clamp(min=0),
            use_cache=True,
        ).past_key_values
    # Beyond a row's end stands its last token again: padding, which no column looks at.
    behind = (start[:, None] + torch.arange(rest, device=device)).clamp(max=input_ids.shape[1] - 1)
    if layout is None:
        mask, position = torch.cat([known, torch.ones_like(behind, dtype=torch.bool)], 1).long(), behind
    else:
        whole = known[:, None].expand(-1, rest, -1)
        mask = additive(~torch.cat([whole, layout.visible(behind)], 2), model.dtype)
        position = layout.position.gather(1, behind)
    context = {"past_key_values": past, "use_cache": True, "attention_mask": mask, "position_ids": position}
    return _Read(input_ids.gather(1, behind), column - start[row], context)


def _by_length(widths: Sequence[int]) -> list[list[int]]:
    """The rows in one group, or in two, short and long, where that saves enough padding."""
    order = sorted(range(len(widths)), key=widths.__getitem__)
    whole = len(order) * widths[order[-1]]
    # Padded tokens if the first `cut` rows go apart from the rest.
    padded = [cut * widths[order[cut - 1]] + (len(order) - cut) * widths[order[-1]] for cut in range(1, len(order))]
    if not padded or min(padded) > (1 - _WORTH_SPLITTING) * whole:
        return [order]
    cut = padded.index(min(padded)) + 1
    return [order[:cut], order[cut:]]
