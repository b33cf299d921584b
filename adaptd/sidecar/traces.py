"""Traces from what an answer said. Pure; called on the capture thread.

vLLM's log-probabilities are those of the logits before temperature, penalties and truncation (`--logprobs-mode
raw_logprobs`, its default, which the proxy checks): temperature 1, as `buffers.trace` wants them. The emitted token comes
first, also where it is not among the most likely ones. Which token was rejected is not said, so `rejected_at` is empty and
a correction is known by its `source` alone; the draft's own log-probabilities are not known either, and the learner
computes them.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from adaptd.sidecar.answer import ChoiceSeen, Seen
from adaptd.sidecar.steps import Figures
from buffers.trace import NO_TOKEN, Source, Trace, is_reserved

Floats = npt.NDArray[np.float64]
_PREFIX = "token_id:"
_CHAT, _TOP, _TOKEN = b'{"content":[', b'"top_logprobs":[', b'"token":'
_PAIR = re.compile(rb'"token":"token_id:(\d+)","logprob":(-?[\d.]+(?:[eE][-+]?\d+)?)[,}]')


class Incomplete(ValueError):
    """The answer does not say enough for a trace; the message is the reason in a few words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """What a trace says beside its tokens."""

    target_id: str
    draft_version: int
    domain: str
    tenant: str
    temperature: float
    top_p: float
    top_k: int
    max_tokens: int
    """Longest trace, cut on the left."""
    reserved_share: float


def build(seen: Seen, figures: Figures | None, about: Provenance) -> list[Trace]:
    """One trace for each choice.

    Raises:
      Incomplete: tokens or log-probabilities are missing or do not fit each other.
    """
    several = len(seen.choices) > 1
    found = []
    for index, choice in sorted(seen.choices.items()):
        request_id = f"{seen.answer_id}-{index}" if several else seen.answer_id
        found.append(_trace(choice, seen.prompt_token_ids, None if several else figures, request_id, about))
    return found


def _trace(
    choice: ChoiceSeen, prompt: list[int] | None, figures: Figures | None, request_id: str, about: Provenance
) -> Trace:
    prompt = choice.prompt_token_ids or prompt
    if not prompt or not choice.token_ids:
        raise Incomplete("no token ids")
    rows = [row for piece in choice.logprobs for row in _rows(piece)]
    size = len(choice.token_ids)
    if len(rows) != size:
        raise Incomplete("log-probabilities do not fit the tokens")
    depth = min(len(row) for row in rows)
    if not depth:
        raise Incomplete("no log-probabilities")
    emitted = np.array([row[0][1] for row in rows])
    if any(row[0][0] != token for row, token in zip(rows, choice.token_ids, strict=True)):
        raise Incomplete("log-probabilities name other tokens")
    rows = [sorted(row, key=lambda item: -item[1])[:depth] for row in rows]
    ids = np.array([[token for token, _ in row] for row in rows], np.uint32)
    logprobs = np.array([[value for _, value in row] for row in rows])
    unknown = np.full(size, np.nan, np.float16)
    steps = figures.steps if figures else None
    trace = Trace(
        tokens=np.array([*prompt, *choice.token_ids], np.uint32),
        prompt_len=len(prompt),
        topk_ids=ids,
        topk_logprobs=_half(logprobs),
        source=steps.sources(size) if steps else np.full(size, Source.UNKNOWN, np.uint8),
        rejected=np.full(size, NO_TOKEN, np.int32),
        draft_logprob=unknown,
        target_logprob=_half(served_logprob(emitted, logprobs, about.temperature, about.top_p, about.top_k)),
        rejected_at=np.empty(0, np.int32),
        draft_topk_ids=np.empty((0, 1), np.uint32),
        draft_topk_logprobs=np.empty((0, 1), np.float16),
        request_id=request_id,
        target_id=about.target_id,
        draft_version=about.draft_version,
        domain=about.domain,
        tenant=about.tenant,
        created_at=time.time(),
        temperature=about.temperature,
        engine="vllm",
        reserved=is_reserved(request_id, about.reserved_share),
        top_p=about.top_p,
        top_k=about.top_k,
        surprise=1.0,  # not known yet: as good a reason to look as any; the learner's first step on it says more
    )
    trace = trace.truncate_left(about.max_tokens)
    trace.validate()
    return trace


def _rows(piece: dict[str, Any] | bytes) -> Iterator[list[tuple[int, float]]]:
    """[(token, log-probability)] of each position of one event, the emitted token first; of either route's form."""
    if isinstance(piece, bytes) and piece.startswith(_CHAT):
        yield from _chat_rows(piece)
        return
    try:
        piece = json.loads(piece) if isinstance(piece, bytes) else piece
        if "content" in piece:
            for position in piece["content"] or ():
                pairs = [(position["token"], position["logprob"])]
                yield _ids(pairs + [(top["token"], top["logprob"]) for top in position["top_logprobs"]])
        else:
            for token, logprob, top in zip(
                piece["tokens"], piece["token_logprobs"], piece["top_logprobs"], strict=True
            ):
                yield _ids([(token, logprob), *top.items()])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Incomplete("log-probabilities are not as expected") from error


def _chat_rows(text: bytes) -> Iterator[list[tuple[int, float]]]:
    """The same from the JSON of a chat answer, whose tokens come with their bytes: most of the text, and never looked at."""
    emitted, *listed = ([(int(t), float(p)) for t, p in _PAIR.findall(part)] for part in text.split(_TOP))
    if len(emitted) != 1 or sum(map(len, listed)) + 1 != text.count(_TOKEN):
        raise Incomplete("log-probabilities are not as expected")
    for i, pairs in enumerate(listed, 1):
        # What follows a list is the next position's own token.
        top, following = (pairs[:-1], pairs[-1:]) if i < len(listed) else (pairs, [])
        found = dict(emitted)
        for token, logprob in top:
            found.setdefault(token, logprob)
        yield list(found.items())
        emitted = following


def _ids(pairs: list[tuple[str, float]]) -> list[tuple[int, float]]:
    """Token ids for their names, each once, in order."""
    found: dict[int, float] = {}
    for name, logprob in pairs:
        if not name.startswith(_PREFIX):
            raise ValueError("a token without its id")
        found.setdefault(int(name[len(_PREFIX) :]), float(logprob))
    return list(found.items())


def served_logprob(emitted: Floats, listed: Floats, temperature: float, top_p: float, top_k: int) -> Floats:
    """log p of each emitted token under what was sampled from: after temperature, top-k and top-p, in this order.

    Args:
      emitted: [R] nats at temperature 1.
      listed: [R, K] the most likely tokens, nats at temperature 1, descending.
      temperature: 0 is greedy: p is that of temperature 1, as for the native engine.
      top_p: 1 is off. top_k: 0 or below is off.
    Returns: [R]; exact at temperature 1 without truncation. Else the tail enters as tokens as likely as the last listed
      one, of which there are as many as its mass allows; where the truncation lies beyond the list it is not applied.
    """
    if temperature == 0 or (temperature == 1 and top_p >= 1 and top_k <= 0):
        return emitted
    scaled = listed / temperature
    weights = np.exp(scaled)
    last = np.maximum(listed[:, -1], -50.0)  # a list whose tail has no mass left: any finite number will do
    tail = np.maximum(0.0, 1.0 - np.exp(listed).sum(1)) / np.exp(last) * np.exp(last / temperature)
    if 0 < top_k <= listed.shape[1]:
        weights[:, top_k:], tail = 0.0, np.zeros_like(tail)
    if top_p < 1:
        total = weights.sum(1) + tail
        before = np.cumsum(weights, 1) - weights
        kept = before < top_p * total[:, None]  # the token that reaches top_p is the last one kept
        whole = kept.all(1) & (weights.sum(1) < top_p * total)  # the nucleus is wider than the list
        weights, tail = np.where(kept | whole[:, None], weights, 0.0), np.where(whole, tail, 0.0)
    result: Floats = np.minimum(0.0, emitted / temperature - np.log(weights.sum(1) + tail))
    return result


def _half(values: Floats) -> npt.NDArray[np.float16]:
    """float16; what is too small to be represented becomes the smallest finite number."""
    return np.maximum(values, float(np.finfo(np.float16).min)).astype(np.float16)


def settings(sampling: dict[str, Any], default_temperature: float) -> tuple[float, float, int]:
    """temperature, top_p, top_k of a request, with defaults where it names none."""
    temperature = float(sampling.get("temperature", default_temperature))
    top_p, top_k = float(sampling.get("top_p", 1.0)), int(sampling.get("top_k", 0))
    if not math.isfinite(temperature) or temperature < 0:
        raise Incomplete("temperature is out of range")
    return temperature, top_p, max(top_k, 0)
