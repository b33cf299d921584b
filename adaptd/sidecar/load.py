"""What a vLLM server's own metrics say of a round at the present load: nothing is asked of it but `/metrics`.

`vllm:inter_token_latency_seconds` is observed once an engine step and request, so over a window its sum by its count is
the time of a round as a request sees it, waiting for others included. What a draft step costs cannot be told from
outside: for that the server would have to be asked to do without one.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import httpx
from prometheus_client.parser import text_string_to_metric_families

#: Seconds that "at present" covers, and rounds below which nothing is said.
WINDOW_S, MIN_ROUNDS = 120.0, 50


@dataclass(frozen=True, slots=True)
class Sample:
    """Counters of all engines and models together."""

    at: float
    seconds: float
    """Of the inter-token latencies."""
    steps: float
    drafts: float
    accepted: float
    running: float
    """Requests in the batch; a gauge."""


@dataclass(frozen=True, slots=True)
class Load:
    """The last minutes of one server."""

    round_s: float
    """Seconds of one round of one request."""
    mal: float
    running: float
    """Mean requests in the batch, over the samples with any."""
    rounds: float


def parse(text: str, at: float) -> Sample:
    """The counters in a Prometheus exposition; those that are absent are 0."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, 0.0) + sample.value
    return Sample(
        at=at,
        seconds=found.get("vllm:inter_token_latency_seconds_sum", 0.0),
        steps=found.get("vllm:inter_token_latency_seconds_count", 0.0),
        drafts=found.get("vllm:spec_decode_num_drafts_total", 0.0),
        accepted=found.get("vllm:spec_decode_num_accepted_tokens_total", 0.0),
        running=found.get("vllm:num_requests_running", 0.0),
    )


class LoadMeter:
    """Samples one server. `poll` raises nothing.

    Args:
      client: its base_url is the server.
      clock: seconds, monotonic.
    """

    def __init__(self, client: httpx.AsyncClient, clock: Callable[[], float] = time.monotonic) -> None:
        self._client, self._clock = client, clock
        self._samples: deque[Sample] = deque()

    async def poll(self) -> None:
        """Take a sample, if the server gives one; one that restarted begins anew."""
        try:
            answer = await self._client.get("/metrics")
            answer.raise_for_status()
            sample = parse(answer.text, self._clock())
        except (httpx.HTTPError, ValueError):
            return
        if self._samples and sample.steps < self._samples[-1].steps:
            self._samples.clear()
        self._samples.append(sample)
        while self._samples[0].at < sample.at - WINDOW_S:
            self._samples.popleft()

    def load(self) -> Load | None:
        """The window; None if there was too little traffic in it, or none with speculation."""
        if len(self._samples) < 2:
            return None
        first, last = self._samples[0], self._samples[-1]
        steps, drafts = last.steps - first.steps, last.drafts - first.drafts
        if steps < MIN_ROUNDS or drafts < MIN_ROUNDS:
            return None
        busy = [sample.running for sample in self._samples if sample.running]
        return Load(
            round_s=(last.seconds - first.seconds) / steps,
            mal=1.0 + (last.accepted - first.accepted) / drafts,
            running=sum(busy) / len(busy) if busy else 1.0,
            rounds=drafts,
        )


def plain_rate(given: float | dict[int, float], running: float) -> float:
    """Tokens a second of one request without speculation at this many requests, between the nearest that were given."""
    if not isinstance(given, dict):
        return given
    points = sorted(given.items())
    for (low, slow), (high, fast) in pairwise(points):
        if low <= running <= high:
            return slow + (fast - slow) * (running - low) / (high - low)
    return points[0][1] if running < points[0][0] else points[-1][1]
