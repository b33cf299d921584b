"""Exact evaluation of a draft on recorded answers, from one teacher-forced pass.

Given the emitted token x, a draft with probability q(x) would have had it accepted with probability min(1, q(x)/p(x))
under rejection sampling (Leviathan et al. 2023, eq. 1 read backwards), and exactly when it is the draft's argmax under
greedy decoding, or under any decoding where the engine drafts greedily (vLLM's default). The expected number of rounds
along the text follows (`policies.acceptance`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from adaptd.learning.batch import Batch, collate, draft_logits
from buffers.trace import Trace
from policies.acceptance import Profile, accept_probability, acceptance_profiles
from policies.warp import served_probs

#: How the engine that serves drafts and accepts, as in `policies.acceptance`.
Rule = Literal["rejection", "greedy_draft"]


def acceptance(logits: Tensor, batch: Batch, traces: Sequence[Trace], rule: Rule = "rejection") -> list[np.ndarray]:
    """Per trace, the probability that each captured position would have been accepted: arrays [R] float64."""
    token = batch.token_ids[:, None]
    greedy = (logits.argmax(-1) == batch.token_ids).double().numpy(force=True)
    p = served_logprob(batch).numpy(force=True)
    parts: list[np.ndarray] = []
    start = 0
    for trace, length in zip(traces, batch.lengths, strict=True):
        rows = slice(start, start + length)
        start += length
        if trace.temperature == 0 or rule == "greedy_draft":
            parts.append(greedy[rows])
            continue
        probs = served_probs(logits[rows], trace.temperature, trace.top_k, trace.top_p)
        q = probs.gather(-1, token[rows])[:, 0].log().numpy(force=True)
        parts.append(accept_probability(q, p[rows]))
    return parts


def served_logprob(batch: Batch) -> Tensor:
    """log p of the emitted token; where not captured, from the top K, else the whole tail (acceptance not overstated)."""
    unknown = batch.target_logprob[batch.judged].isnan()
    served = batch.target_logprob.clone()
    if bool(unknown.any()):
        hit = batch.topk_ids == batch.token_ids[batch.judged, None]
        listed = batch.topk_logprobs.masked_fill(~hit, -torch.inf).amax(-1)
        tail = (1 - batch.topk_logprobs.exp().sum(-1)).clamp_min(1e-8).log()
        fallback = torch.where(hit.any(-1), listed, tail)
        served[batch.judged] = torch.where(unknown, fallback, served[batch.judged])
    return served


@torch.inference_mode()
def profiles(
    model: PreTrainedModel,
    traces: Sequence[Trace],
    k: int,
    *,
    max_tokens: int,
    batch_traces: int = 32,
    rule: Rule = "rejection",
) -> list[Profile]:
    """What decoding each trace's answer with this draft would have cost: expected rounds, acceptances by depth.

    Args:
      model: the draft, Hugging Face forward.
      traces: recorded answers of the target.
      k: tokens proposed a round.
      max_tokens: longest sequence in a forward pass.
      batch_traces: traces a forward pass; similar lengths go together.
      rule: of the engine that will serve this draft.
    """
    device = next(model.parameters()).device
    order = sorted(range(len(traces)), key=lambda i: len(traces[i].tokens))
    accepted: dict[int, np.ndarray] = {}
    for start in range(0, len(order), batch_traces):
        chosen = order[start : start + batch_traces]
        group = [traces[i] for i in chosen]
        batch = collate(group, max_tokens, device)
        accepted |= zip(chosen, acceptance(draft_logits(model, batch), batch, group, rule), strict=True)
    return acceptance_profiles([accepted[i] for i in range(len(traces))], k)
