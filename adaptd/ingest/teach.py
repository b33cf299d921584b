"""Traces from recorded answers: judged by the target in one teacher-forced pass, or as hard labels alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from adaptd.ingest.record import Record
from adaptd.ingest.render import Rendered
from adaptd.learning.batch import collate, draft_logits
from buffers.trace import NO_TOKEN, Source, Trace, is_reserved
from policies.tail import captured_draws
from policies.warp import served_probs

#: Log-probability of the fillers of a hard label: below what the tail bucket resolves.
_NEVER = -30.0
#: Bytes of logits that one pass may hold, [N, V] float32.
_LOGITS_BYTES = 1 << 28


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """What all traces of a replay have in common."""

    target_id: str
    k_top: int
    vocab: int
    max_tokens: int
    """Longest trace, cut on the left."""
    reserved_share: float
    temperature: float
    """Of a request that names none."""
    engine: str


def label(record: Record, rendered: Rendered, request_id: str, about: Provenance) -> Trace:
    """The answer as hard labels: the target's distribution is taken for all on the emitted token.

    The K - 1 other candidates are fillers without mass, so that such traces and judged ones fit one batch.
    """
    answer = np.asarray(rendered.answer, np.uint32)
    size, k_top = len(answer), min(about.k_top, about.vocab)
    ids = (answer[:, None].astype(np.int64) + np.arange(k_top)) % about.vocab
    logprobs = np.full((size, k_top), _NEVER, np.float16)
    logprobs[:, 0] = 0.0
    trace = Trace(
        tokens=np.asarray([*rendered.prompt, *rendered.answer], np.uint32),
        prompt_len=len(rendered.prompt),
        topk_ids=ids.astype(np.uint32),
        topk_logprobs=logprobs,
        source=np.full(size, Source.UNKNOWN, np.uint8),
        rejected=np.full(size, NO_TOKEN, np.int32),
        draft_logprob=np.full(size, np.nan, np.float16),
        target_logprob=np.full(size, np.nan, np.float16),
        rejected_at=np.empty(0, np.int32),
        draft_topk_ids=np.empty((0, 1), np.uint32),
        draft_topk_logprobs=np.empty((0, 1), np.float16),
        request_id=request_id,
        target_id=about.target_id,
        draft_version=0,
        domain=record.domain,
        tenant=record.tenant,
        created_at=record.at if np.isfinite(record.at) else 0.0,
        temperature=about.temperature if record.temperature is None else record.temperature,
        engine=about.engine,
        reserved=is_reserved(request_id, about.reserved_share),
        top_p=1.0 if record.top_p is None or not 0 < record.top_p <= 1 else record.top_p,
        top_k=record.top_k or 0,
    )
    return trace.truncate_left(about.max_tokens)


@torch.inference_mode()
def judge(target: PreTrainedModel, labelled: Sequence[Trace], k_tail: int = 0) -> list[Trace]:
    """The same answers with what the target thinks of every position: its K most likely tokens and log p of the emitted one.

    And `k_tail` draws of its other tokens, but for what is reserved.

    A token that the served distribution cannot have given (top-p and top-k cut it off, so somebody else's settings are
    logged) has the log-probability of the distribution before the cut.
    """
    found: dict[int, Trace] = {}
    rng = np.random.default_rng(0)
    for chosen in _groups(labelled, int(target.config.get_text_config().vocab_size)):
        group = [labelled[i] for i in chosen]
        batch = collate(group, max(len(t.tokens) for t in group), next(target.parameters()).device)
        logits = draft_logits(target, batch)
        logprobs = logits.log_softmax(-1)
        best = logprobs.topk(group[0].topk_ids.shape[1], dim=-1)
        ids, values = best.indices.numpy(force=True), best.values.numpy(force=True)
        drawn = captured_draws(logprobs, best.indices, k_tail, rng)
        start = 0
        for index, trace, length in zip(chosen, group, batch.lengths, strict=True):
            rows, token = slice(start, start + length), batch.token_ids[start : start + length, None]
            start += length
            served = logprobs[rows].gather(-1, token)[:, 0]
            if trace.temperature > 0:
                scaled = (logits[rows] / trace.temperature).log_softmax(-1).gather(-1, token)[:, 0]
                cut = served_probs(logits[rows], trace.temperature, trace.top_k, trace.top_p).gather(-1, token)[:, 0]
                served = torch.where(cut > 0, cut.log(), scaled)
            found[index] = dataclasses.replace(
                trace,
                topk_ids=ids[rows].astype(np.uint32),
                topk_logprobs=_half(values[rows]),
                tail_ids=None if drawn is None or trace.reserved else drawn[rows],
                target_logprob=_half(served.numpy(force=True)),
            )
    return [found[i] for i in range(len(labelled))]


def _groups(traces: Sequence[Trace], vocab: int) -> Iterator[list[int]]:
    """Traces of similar length whose logits fit `_LOGITS_BYTES`; at least one a group."""
    most = max(1, _LOGITS_BYTES // (4 * vocab))
    group: list[int] = []
    positions = 0
    for index in sorted(range(len(traces)), key=lambda i: len(traces[i].tokens)):
        if group and positions + traces[index].response_len > most:
            yield group
            group, positions = [], 0
        group.append(index)
        positions += traces[index].response_len
    if group:
        yield group


def _half(values: np.ndarray) -> np.ndarray:
    """float16; what is too small for it becomes the smallest finite number."""
    found: np.ndarray = np.maximum(values, np.float32(np.finfo(np.float16).min)).astype(np.float16)
    return found
