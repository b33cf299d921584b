"""What a verification would have seen, had a given draft proposed: acceptance and traces from one teacher-forced pass.

The target's tokens do not depend on the draft. Given the emitted token x, a proposal there is accepted with probability
min(1, q(x) / p(x)) (at temperature 0: if x is the draft's argmax), independently along the text. So the expected rounds
are exact (`policies.acceptance`), and one draw of the accepted positions gives the trace that decoding would have left.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from adaptd.bench.branches import BranchScorer
from adaptd.decoding.recall import observe_trace
from adaptd.learning.batch import Batch, collate, draft_logits
from adaptd.learning.evaluate import Rule, acceptance, served_logprob
from buffers.trace import NO_TOKEN, Source, Trace
from policies.acceptance import Profile, acceptance_profiles
from policies.recall import Recall
from policies.surprise import surprise_priority, surprise_ratio
from policies.warp import served_probs

_BATCH = 32


@torch.inference_mode()
def verify(
    model: PreTrainedModel,
    traces: Sequence[Trace],
    k: int,
    rng: np.random.Generator,
    *,
    version: int,
    k_draft: int = 8,
    recall: Recall | None = None,
    rule: Rule = "rejection",
    scorer: BranchScorer | None = None,
) -> tuple[list[Profile], list[Trace]]:
    """Expected counts of each answer under this draft, and the traces that it would have left.

    Args:
      model: the draft that proposes.
      traces: the target's answers, all positions captured.
      k: proposals a round.
      rng: draws which proposals are accepted. Its state afterwards depends on the answers only, not on the draft.
      version: of the draft, for the traces.
      k_draft: draft candidates kept at a correction.
      recall: what the decoder remembers; it learns from these answers after all of them have been verified.
      rule: of the engine that serves; recall is the native engine's alone, which rejects.
      scorer: adds what a verification scores behind its rejections to the traces.
    """
    accepts: list[NDArray[np.float64]] = []
    seen: list[Trace] = []
    for start in range(0, len(traces), _BATCH):
        group = traces[start : start + _BATCH]
        batch = collate(group, max(len(t.tokens) for t in group), next(model.parameters()).device)
        logits = draft_logits(model, batch)
        found = acceptance(logits, batch, group, rule) if recall is None else _recalled(recall, logits, batch, group)
        logprobs = logits.log_softmax(-1)
        best = logprobs.topk(k_draft, dim=-1)
        token = logprobs.gather(-1, batch.token_ids[:, None])[:, 0].numpy(force=True)
        ids, values = best.indices.numpy(force=True), best.values.numpy(force=True)
        ends = np.cumsum(batch.lengths)
        left = []
        for trace, accept, end in zip(group, found, ends, strict=True):
            rows = slice(end - len(accept), end)
            accepts.append(accept)
            left.append(
                _trace(trace, accept, rng.random(len(accept)), k, token[rows], ids[rows], values[rows], version)
            )
        seen += left if scorer is None else scorer.add(model, left, torch.split(logits, list(batch.lengths)))
    if recall is not None:
        for trace in traces:
            observe_trace(recall, trace)
    return acceptance_profiles(accepts, k), seen


def _recalled(recall: Recall, logits: Tensor, batch: Batch, traces: Sequence[Trace]) -> list[NDArray[np.float64]]:
    """`acceptance` of proposals with what is recalled mixed in; weighs the sources after each answer."""
    accepted: list[NDArray[np.float64]] = []
    columns = (logits, batch.row, batch.column, batch.token_ids, served_logprob(batch))
    for trace, *of_trace in zip(traces, *(torch.split(c, list(batch.lengths)) for c in columns), strict=True):
        rows, row, column, token, p = of_trace
        found = recall.look(batch.input_ids[row], column + 1, torch.full_like(row, recall.slot(trace.domain)))
        if trace.temperature == 0:
            q = nn.functional.one_hot(rows.argmax(-1), rows.shape[-1]).float()
            accept, p = (recall.mix(q, found).argmax(-1) == token).double(), torch.zeros_like(p)
            own = q.gather(-1, token[:, None])[:, 0]
        else:
            q = served_probs(rows, trace.temperature, trace.top_k, trace.top_p)
            own = q.gather(-1, token[:, None])[:, 0]
            accept = (found.mixed_at(own, token) / p.exp()).clamp_max(1.0).double()
        recall.learn(found, own, p.exp(), token, torch.ones_like(token, dtype=torch.bool))
        accepted.append(accept.numpy(force=True))
    return accepted


def _trace(
    trace: Trace,
    accept: NDArray[np.float64],
    uniform: NDArray[np.float64],
    k: int,
    draft_logprob: NDArray[np.float32],
    ids: NDArray[np.int64],
    logprobs: NDArray[np.float32],
    version: int,
) -> Trace:
    source = sources(uniform < accept, k)
    at = np.flatnonzero(source == Source.CORRECTION)
    # Which token was proposed and rejected is not drawn: the draft's first choice that was not emitted stands for it.
    first_choice = np.where(ids[:, 0] == trace.response, ids[:, 1], ids[:, 0])
    rejected = np.full(len(source), NO_TOKEN, np.int32)
    rejected[at] = first_choice[at]
    return dataclasses.replace(
        trace.without_branches(),  # another draft's
        source=source,
        rejected=rejected,
        rejected_at=at.astype(np.int32),
        draft_logprob=np.where(source == Source.BONUS, np.nan, draft_logprob).astype(np.float16),
        draft_topk_ids=ids[at].astype(np.uint32),
        draft_topk_logprobs=logprobs[at].astype(np.float16),
        draft_version=version,
        created_at=time.time(),
        surprise=surprise_priority(surprise_ratio(draft_logprob, logprobs), "surprise", 1.0),
    )


def sources(accepted: NDArray[np.bool_], k: int) -> NDArray[np.uint8]:
    """How each token came to be, `Source` codes [R], if `accepted` says which proposals pass."""
    source = np.empty(len(accepted), np.uint8)
    depth = 0
    for position, passes in enumerate(accepted):
        if depth == k:
            source[position], depth = Source.BONUS, 0
        elif passes:
            source[position], depth = Source.ACCEPTED, depth + 1
        else:
            source[position], depth = Source.CORRECTION, 0
    return source


def rejections_only(trace: Trace) -> Trace:
    """The trace as `capture.positions: rejected` leaves it: target candidates at corrections alone."""
    at = trace.rejected_at
    plain = trace.without_branches()
    tail_ids = None if trace.tail_ids is None else trace.tail_ids[at]
    return dataclasses.replace(
        plain, topk_ids=trace.topk_ids[at], topk_logprobs=trace.topk_logprobs[at], tail_ids=tail_ids
    )
