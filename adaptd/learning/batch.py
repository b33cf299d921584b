"""Traces to padded tensors: one forward over whole sequences, with the rows that carry a captured target distribution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

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
    source: Tensor
    """[M] int64, how the token at each judged position came to be: codes of `buffers.trace.Source`."""
    target_logprob: Tensor
    """[N] float32 nats of the emitted token under the served target distribution; NaN where unknown."""
    lengths: tuple[int, ...]
    """Positions of each trace; sums to N."""
    widths: tuple[int, ...]
    """Tokens of each trace without padding."""
    prompt_lens: tuple[int, ...]
    """Tokens of each trace's prompt that are there."""
    domains: tuple[str, ...]
    """Domain of each trace."""

    @property
    def tokens(self) -> int:
        """Tokens of the traces, padding not counted."""
        return sum(self.widths)


def collate(traces: Sequence[Trace], max_tokens: int, device: torch.device | str = "cpu") -> Batch:
    """Pad traces to one batch; a trace longer than `max_tokens` loses tokens (and positions) on the left.

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
        source.append(trace.source[trace.judged_at[known]])
        served.append(trace.target_logprob[first:])
        lengths.append(len(column))

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
        source=tensor(source, np.int64),
        target_logprob=tensor(served, np.float32),
        lengths=tuple(lengths),
        widths=tuple(len(t.tokens) - cut for t, cut in zip(traces, cuts, strict=True)),
        domains=tuple(t.domain for t in traces),
        prompt_lens=tuple(max(1, t.prompt_len - cut) for t, cut in zip(traces, cuts, strict=True)),
    )


#: Share of a batch's tokens that must be padding saved before it is worth two forward passes in the place of one.
_WORTH_SPLITTING = 0.15


def draft_logits(model: PreTrainedModel, batch: Batch, *, prompt_gradient: bool = True) -> Tensor:
    """The draft's logits at every captured position, [N, V] float32.

    Only those positions go through the output head, the dearest part of a small draft: a hook picks them in front of
    it, so that whatever an architecture does to logits behind its head is still done. On a CPU, where every padded
    token costs, short and long traces go separately.

    Args:
      prompt_gradient: False: what stands in front of the first captured position of a row is read first, without a
        gradient. The logits are the same; of a long prompt and a short answer a step keeps the answer's activations alone.
    """
    openness = _openness(model, batch)
    groups = _by_length(batch.widths) if batch.input_ids.device.type == "cpu" else [list(range(len(batch.widths)))]
    if len(groups) == 1:
        return _forward(model, batch.input_ids, batch.row, batch.column, openness, prompt_gradient)
    parts, places = [], []
    for group in groups:
        place = torch.full((len(batch.widths),), -1)
        place[group] = torch.arange(len(group))
        here = torch.nonzero(place[batch.row] >= 0)[:, 0]
        ids = batch.input_ids[group, : max(batch.widths[i] for i in group)]
        rows = None if openness is None else openness[group]
        parts.append(_forward(model, ids, place[batch.row[here]], batch.column[here], rows, prompt_gradient))
        places.append(here)
    place = torch.cat(places)
    joined = torch.cat(parts)
    return joined if bool((place.diff() > 0).all()) else joined[place.argsort()]


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
) -> Tensor:
    with conditioned(model, openness) as gate:
        read = (None if prompt_gradient else _read_prompts(model, input_ids, row, column)) or _Read(
            input_ids, column, {}
        )

        def pick(_head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            if openness is not None:
                gate.value = openness[row, 0][None]
            return (inputs[0][row, read.column][None],)

        handle = model.get_output_embeddings().register_forward_pre_hook(pick)
        try:
            logits: Tensor = model(input_ids=read.input_ids, use_cache=bool(read.cache), **read.cache).logits[0].float()
        finally:
            handle.remove()
    return logits


class _Read(NamedTuple):
    """What a forward pass still has to read."""

    input_ids: Tensor
    """[B, T]."""
    column: Tensor
    """[N], as in `Batch`, counted in these tokens."""
    cache: dict[str, Any]
    """Arguments of the model that stand for what was read already."""


def _read_prompts(model: PreTrainedModel, input_ids: Tensor, row: Tensor, column: Tensor) -> _Read | None:
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
    behind = start[:, None] + torch.arange(rest, device=device)
    mask = torch.cat([known, torch.ones_like(behind, dtype=torch.bool)], 1).long()
    return _Read(
        # Beyond a row's end stands its last token again: padding, which no column looks at.
        input_ids.gather(1, behind.clamp(max=input_ids.shape[1] - 1)),
        column - start[row],
        {"past_key_values": past, "attention_mask": mask, "position_ids": behind},
    )


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
