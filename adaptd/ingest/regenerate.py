"""The target answers logged questions again, batched, at the sampling settings of the log or of the deployment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from adaptd.decoding.engine import SpeculativeDecoder
from adaptd.decoding.request import MIN_TEMPERATURE, DecodeRequest, SamplingParams
from adaptd.ingest.record import Record
from buffers.trace import Trace


class Regenerator:
    """Answers with a decoder that captures; the draft beside the target makes it faster and changes no answer.

    Args:
      temperature: of a request that names none.
      max_tokens: longest answer where the request sets no limit.
      seed: the first request's; each has its own.
    """

    def __init__(self, engine: SpeculativeDecoder, *, temperature: float, max_tokens: int, seed: int) -> None:
        self._engine, self._temperature, self._max_tokens, self._seed = engine, temperature, max_tokens, seed

    def request(self, record: Record, prompt: Sequence[int], request_id: str, number: int) -> DecodeRequest:
        """The request of a record; `number` counts records, for the seed."""
        temperature = self._temperature if record.temperature is None else record.temperature
        return DecodeRequest(
            request_id=request_id,
            prompt_ids=tuple(prompt),
            params=SamplingParams(
                temperature=temperature if temperature >= MIN_TEMPERATURE else 0.0,
                top_p=record.top_p if record.top_p is not None and 0 < record.top_p <= 1 else 1.0,
                top_k=record.top_k or 0,
                max_tokens=min(record.max_tokens or self._max_tokens, self._engine.max_length - len(prompt)),
                seed=self._seed + number,
            ),
            domain=record.domain,
            tenant=record.tenant,
        )

    def answer(self, requests: Sequence[DecodeRequest], times: Sequence[float]) -> list[Trace]:
        """The traces of the answers, in order, dated as the questions were."""
        waiting = list(reversed(requests))
        found: dict[str, Trace] = {}
        while waiting or self._engine.active:
            while waiting and self._engine.can_add():
                self._engine.add(waiting.pop())
            for delta in self._engine.step():
                if delta.finished is not None and delta.finished.trace is not None:
                    found[delta.request_id] = delta.finished.trace
        return [
            replace(found[r.request_id], created_at=at if np.isfinite(at) else 0.0)
            for r, at in zip(requests, times, strict=True)
        ]
