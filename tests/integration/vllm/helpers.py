"""What the tests against a real server share: answers with the target's distribution, and exact expectations."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from adaptd.learning.batch import collate, draft_logits
from adaptd.learning.evaluate import acceptance
from adaptd.models.scope import AdaptedDraft
from adaptd.sidecar.client import VllmClient
from adaptd.sidecar.writer import UpdateWriter
from buffers.trace import NO_TOKEN, Source, Trace
from checkpoints.manifest import Manifest
from checkpoints.store import CheckpointStore

K = 4
MAX_TOKENS = 32
TOP = 16


@dataclass
class Draft:
    """The adapted draft, its versions, and the answers that it was trained on (the first 64) and is judged by."""

    adapted: AdaptedDraft
    store: CheckpointStore
    writer: UpdateWriter
    answers: list[Trace]

    @property
    def held_out(self) -> list[Trace]:
        return self.answers[64:]

    def accepts(self, version: int) -> list[np.ndarray]:
        """Whether each position of each held-out answer is the argmax of a version: exact, from one pass."""
        self.adapted.load(self.store.load(version)[1] if version else {})
        batch = collate(self.held_out, 512)
        with torch.inference_mode():
            logits = draft_logits(self.adapted.model, batch)
        return acceptance(logits, batch, self.held_out)


def steps_of(accepted: np.ndarray) -> list[int]:
    """Accepted proposals of each whole verification step: the first token comes from the prompt's own pass."""
    steps, at = [], 1
    while at + K < len(accepted):
        row = accepted[at : at + K] > 0.5
        n = K if row.all() else int(row.argmin())
        steps.append(n)
        at += n + 1
    return steps


async def complete(url: str, prompts: Sequence[Sequence[int]], concurrency: int = 8) -> list[dict[str, Any]]:
    """Greedy completions, in order."""
    client, slots = VllmClient(url), asyncio.Semaphore(concurrency)

    async def one(prompt: Sequence[int]) -> dict[str, Any]:
        async with slots:
            return await client.complete(
                "pocket", prompt, max_tokens=MAX_TOKENS, temperature=0, return_token_ids=True, ignore_eos=True
            )

    try:
        return list(await asyncio.gather(*(one(prompt) for prompt in prompts)))
    finally:
        await client.close()


def tokens(answers: Sequence[dict[str, Any]]) -> list[list[int]]:
    return [answer["choices"][0]["token_ids"] for answer in answers]


def traces_of(url: str, prompts: Sequence[Sequence[int]], target: Any) -> list[Trace]:
    """The server's answers with the target's most likely tokens at each position, by a pass of the same target here."""
    found = []
    for prompt, answer in zip(prompts, tokens(asyncio.run(complete(url, prompts))), strict=True):
        ids = torch.tensor([[*prompt, *answer]])
        with torch.inference_mode():
            logprobs = target(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        top = logprobs.topk(TOP)
        found.append(_trace(ids[0].numpy(), len(prompt), top.indices.numpy(), top.values.numpy()))
    return found


def _trace(ids: np.ndarray, prompt_len: int, top_ids: np.ndarray, top_logprobs: np.ndarray) -> Trace:
    n = len(ids) - prompt_len
    return Trace(
        tokens=ids.astype(np.uint32),
        prompt_len=prompt_len,
        topk_ids=top_ids.astype(np.uint32),
        topk_logprobs=top_logprobs.astype(np.float16),
        source=np.full(n, Source.UNKNOWN, np.uint8),
        rejected=np.full(n, NO_TOKEN, np.int32),
        draft_logprob=np.full(n, math.nan, np.float16),
        target_logprob=np.zeros(n, np.float16),
        rejected_at=np.zeros(0, np.int32),
        draft_topk_ids=np.zeros((0, 8), np.uint32),
        draft_topk_logprobs=np.zeros((0, 8), np.float16),
        request_id="r",
        target_id="pocket",
        draft_version=0,
        domain="math",
        tenant="",
        created_at=0.0,
        temperature=0.0,
        engine="vllm",
        reserved=False,
    )


def publish_like(store: CheckpointStore, of: Manifest, tensors: dict[str, torch.Tensor]) -> int:
    """Publish tensors as the next version of the draft that `of` is one of."""
    made = store.publish(
        tensors,
        base_id=of.base_id,
        tokenizer_hash=of.tokenizer_hash,
        scope=of.scope,
        scope_config=of.scope_config,
        gate={},
        window={},
        config={},
    )
    return made.version
