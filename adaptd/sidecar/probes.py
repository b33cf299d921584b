"""Whether a draft does in the server what the gate said it would: the same few prompts, before and after a swap.

Decoded at temperature 0, where the target's text does not depend on the draft: the pairs are exact, and what differs is
the draft alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from adaptd.errors import PublishFailed
from adaptd.sidecar.client import VllmClient
from policies.gate import GAIN_STRATUM, Interval, Score, paired_bootstrap

#: Probe prompts below which nothing is concluded from their interval.
MIN_PROBES = 8


@dataclass(frozen=True, slots=True)
class Probe:
    """What the server made of one prompt."""

    tokens: tuple[int, ...]
    rounds: int
    proposed: int
    accepted: int


class Prober:
    """Sends the probe prompts to one server.

    Args:
      prompts: gives the prompts as token ids; called before each swap, in a thread, so that they follow the traffic.
      max_tokens: of each answer.
      concurrency: probes in flight: they share the server with live traffic.
    """

    def __init__(
        self,
        client: VllmClient,
        prompts: Callable[[], Sequence[Sequence[int]]],
        *,
        max_tokens: int = 32,
        concurrency: int = 4,
    ) -> None:
        self._client, self._prompts = client, prompts
        self._max_tokens = max_tokens
        self._slots = asyncio.Semaphore(concurrency)

    def prompts(self) -> list[list[int]]:
        """The prompts of the next comparison."""
        return [list(prompt) for prompt in self._prompts()]

    async def measure(self, prompts: Sequence[Sequence[int]]) -> list[Probe]:
        """One answer to each prompt, in order.

        Raises:
          PublishFailed: (`unsupported`) the server does not report acceptance with its answers.
          UpstreamUnavailable, UpstreamRefused: it does not answer, or refuses.
        """
        if not prompts:
            return []
        model = str((await self._client.models())[0]["id"])
        return list(await asyncio.gather(*(self._one(model, prompt) for prompt in prompts)))

    async def _one(self, model: str, prompt: Sequence[int]) -> Probe:
        async with self._slots:
            answer = await self._client.complete(
                model, prompt, max_tokens=self._max_tokens, temperature=0, return_token_ids=True
            )
        found = _speculation(answer)
        if found is None:
            raise PublishFailed(
                "unsupported",
                "the server's answers carry no acceptance: start it with --per-request-spec-decode-metrics detailed",
            )
        return Probe(
            tuple(answer["choices"][0].get("token_ids") or ()),
            int(found.get("num_spec_steps", 0)),
            int(found.get("num_draft_tokens", 0)),
            int(found.get("num_accepted_draft_tokens", 0)),
        )


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the comparison says."""

    kept: bool
    #: One sentence with the numbers that decided.
    reason: str
    #: Measured relative gain in MAL; None where nothing was measured.
    gain: Interval | None = None


def compare(
    before: Sequence[Probe], after: Sequence[Probe], promised_low: float | None, rng: np.random.Generator
) -> Outcome:
    """Whether the promise holds: the measured interval of the gain must reach the lower end of the gate's.

    Without a promise (a rollback, day 0) only a dead draft is refused: nothing accepted where the one before it was
    accepted. Too few probes decide nothing.

    Args:
      before, after: the same prompts with the version before and the new one.
      promised_low: lower bound of the relative gain in MAL that the gate reported.
    """
    pairs = [(b, a) for b, a in zip(before, after, strict=True) if b.rounds > 0 and a.rounds > 0]
    if len(pairs) < MIN_PROBES:
        return Outcome(True, f"only {len(pairs)} of {MIN_PROBES} probe prompts: nothing concluded")
    was, now = sum(b.accepted for b, _ in pairs), sum(a.accepted for _, a in pairs)
    proposed = sum(a.proposed for _, a in pairs)
    gain = paired_bootstrap([_score(a) for _, a in pairs], [_score(b) for b, _ in pairs], rng)
    measured = f"{gain.mean:+.1%} ({gain.low:+.1%} to {gain.high:+.1%}) on {len(pairs)} probe prompts"
    if now == 0 and was > 0:
        return Outcome(False, f"none of {proposed} proposals was accepted, {was} were before: the draft is dead", gain)
    if promised_low is not None and gain.high < promised_low:
        return Outcome(False, f"measured gain {measured} does not reach the {promised_low:+.1%} promised", gain)
    return Outcome(True, f"measured gain {measured}", gain)


def _score(probe: Probe) -> Score:
    # By rounds and accepted tokens, not by text length: the first token of an answer comes from the prompt's own pass.
    return Score("probe", GAIN_STRATUM, float(probe.rounds + probe.accepted), float(probe.rounds))


def _speculation(answer: dict[str, Any]) -> dict[str, Any] | None:
    metrics = answer.get("metrics")
    found = metrics.get("speculative_decoding") if isinstance(metrics, dict) else None
    return found if isinstance(found, dict) else None
