"""Scores by which a budget of records is spent: representation shift of the target, SurpriseRatio of the draft."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from adaptd.learning.batch import Batch, collate, draft_logits
from buffers.trace import Trace
from policies.shift import RepresentationShift
from policies.surprise import surprise_priority, surprise_ratio

Selection = Literal["shift", "surprise", "random"]
SELECTIONS: tuple[str, ...] = get_args(Selection)

#: Principal directions, and the quantile over an answer's tokens (paper 4 takes the tail).
COMPONENTS, RHO = 64, 0.9
#: Traces that are the reference.
REFERENCE = 256
#: Draft probabilities in the SurpriseRatio's denominator.
_TOP = 8


@torch.inference_mode()
def hidden_states(model: PreTrainedModel, traces: Sequence[Trace]) -> list[np.ndarray]:
    """What the output head sees at each response position: float32 [R, H] a trace."""
    batch = _batch(model, traces)
    seen: list[Tensor] = []

    def pick(_head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen.append(inputs[0][batch.row, batch.column].float())
        return (inputs[0][:1, :1],)  # the logits are not wanted

    handle = model.get_output_embeddings().register_forward_pre_hook(pick)
    try:
        model(input_ids=batch.input_ids, use_cache=False)
    finally:
        handle.remove()
    return [part.numpy(force=True) for part in torch.split(seen[0], list(batch.lengths))]


def fit_reference(model: PreTrainedModel, traces: Sequence[Trace]) -> RepresentationShift:
    """The reference that shifts are measured from."""
    return RepresentationShift.fit(np.concatenate([hidden_states(model, [t])[0] for t in traces]), COMPONENTS)


def shifts(model: PreTrainedModel, reference: RepresentationShift, traces: Sequence[Trace]) -> list[float]:
    """Score of each trace: high for what the reference does not hold."""
    return [reference.score(states, RHO) for states in hidden_states(model, traces)]


@torch.inference_mode()
def surprises(
    draft: PreTrainedModel, traces: Sequence[Trace], mode: Literal["agreement", "surprise"], tau: float
) -> list[float]:
    """SurpriseRatio score of each trace under the draft, as a new trace's priority (`policies.surprise`)."""
    batch = _batch(draft, traces)
    logprobs = draft_logits(draft, batch).log_softmax(-1)
    token = logprobs.gather(-1, batch.token_ids[:, None])[:, 0].numpy(force=True)
    top = logprobs.topk(_TOP, dim=-1).values.numpy(force=True)
    ratios = np.split(surprise_ratio(token, top), np.cumsum(batch.lengths)[:-1])
    return [surprise_priority(r, mode, tau) for r in ratios]


def _batch(model: PreTrainedModel, traces: Sequence[Trace]) -> Batch:
    return collate(traces, max(len(t.tokens) for t in traces), next(model.parameters()).device)
