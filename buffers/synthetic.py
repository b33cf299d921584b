"""Made-up traces with the shape of real ones, for benchmarks, health checks and tests. Contents are random numbers."""

from typing import Any

import numpy as np

from buffers.trace import NO_TOKEN, Branches, Source, Trace


def synthetic_trace(
    rng: np.random.Generator,
    *,
    request_id: str = "synthetic",
    n_prompt: int = 16,
    n_response: int = 48,
    n_top: int = 32,
    n_draft_top: int = 8,
    n_branch: int = 0,
    n_branch_top: int = 8,
    n_tail: int = 0,
    vocabulary: int = 4096,
    **overrides: Any,
) -> Trace:
    """A valid trace of `n_prompt` + `n_response` tokens; about 200 bytes a response position at `n_top` = 32.

    Sources are drawn as corrections (30 %), accepted (60 %) and bonus tokens (10 %). With `n_branch` above 0 there are
    branches of 1 to that many tokens, with `n_tail` as many draws at each position and behind each of them. `overrides`
    replace any field.
    """
    source = rng.choice([0, 1, 2], size=n_response, p=[0.3, 0.6, 0.1]).astype(np.uint8)
    rejected_at = np.flatnonzero(source == Source.CORRECTION).astype(np.int32)
    rejected = np.full(n_response, NO_TOKEN, dtype=np.int32)
    rejected[rejected_at] = rng.integers(0, vocabulary, len(rejected_at))
    fields: dict[str, Any] = {
        "tokens": rng.integers(0, vocabulary, n_prompt + n_response).astype(np.uint32),
        "prompt_len": n_prompt,
        "topk_ids": rng.integers(0, vocabulary, (n_response, n_top)).astype(np.uint32),
        "topk_logprobs": -np.sort(rng.exponential(4.0, (n_response, n_top))).astype(np.float16),
        "source": source,
        "rejected": rejected,
        "draft_logprob": -rng.exponential(2.0, n_response).astype(np.float16),
        "target_logprob": -rng.exponential(1.0, n_response).astype(np.float16),
        "rejected_at": rejected_at,
        "draft_topk_ids": rng.integers(0, vocabulary, (len(rejected_at), n_draft_top)).astype(np.uint32),
        "draft_topk_logprobs": -np.sort(rng.exponential(4.0, (len(rejected_at), n_draft_top))).astype(np.float16),
        "request_id": request_id,
        "target_id": "target-0",
        "draft_version": 0,
        "domain": "synthetic",
        "tenant": "default",
        "created_at": 1_800_000_000.0,
        "temperature": 0.8,
        "engine": "native",
        "reserved": False,
    }
    if n_branch:
        lens = rng.integers(1, n_branch + 1, len(rejected_at)).astype(np.uint8)
        first = np.cumsum(lens) - lens
        tokens = rng.integers(0, vocabulary, lens.sum()).astype(np.uint32)
        tokens[first] = rejected[rejected_at]
        best = rng.integers(0, vocabulary, (len(tokens), n_branch_top)).astype(np.uint32)
        logprobs = -np.sort(rng.exponential(4.0, best.shape)).astype(np.float16)
        drawn = rng.integers(0, vocabulary, (len(tokens), n_tail)).astype(np.uint32) if n_tail else None
        fields["branches"] = Branches(rejected_at, lens, tokens, best, logprobs, drawn)
    if n_tail:
        fields["tail_ids"] = rng.integers(0, vocabulary, (n_response, n_tail)).astype(np.uint32)
    return Trace(**(fields | overrides))
