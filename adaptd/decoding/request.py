"""What goes into the decoder and what comes out of it. Plain values; no tensors, no clocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from buffers.trace import Trace

FinishReason = Literal["stop", "length", "abort"]
#: Token ids to text. Special tokens should be skipped; an end-of-sequence token that ended a row is never passed.
Detokenize = Callable[[Sequence[int]], str]
#: Below this, logits divided by it leave the range of float32; ask for greedy decoding instead.
MIN_TEMPERATURE = 1e-6


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the tokens of one request are chosen.

    Raises: ValueError: a value is out of range.
    """

    temperature: float = 1.0
    """0 is greedy decoding, a branch of its own; otherwise logits are divided by it, target's and draft's alike."""
    top_p: float = 1.0
    """Keep the smallest set of tokens with at least this probability, after `top_k`; 1 keeps all."""
    top_k: int = 0
    """Keep this many most likely tokens; 0 keeps all."""
    max_tokens: int = 256
    """Tokens to generate at most."""
    seed: int | None = None
    """Seed of the request's own generator; None draws one from the operating system."""
    stop: tuple[str, ...] = ()
    """Strings that end the answer; they are not part of the text returned."""
    ignore_eos: bool = False
    """Go on behind an end-of-sequence token (for benchmarks)."""

    def __post_init__(self) -> None:
        if not (self.temperature == 0.0 or MIN_TEMPERATURE <= self.temperature < math.inf):
            raise ValueError(
                f"temperature ({self.temperature}) must be 0 or a finite number of at least {MIN_TEMPERATURE}; "
                "0 decodes greedily"
            )
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p ({self.top_p}) must be above 0 and at most 1; 1 keeps every token")
        if self.top_k < 0:
            raise ValueError(f"top_k ({self.top_k}) must be at least 0; 0 keeps every token")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens ({self.max_tokens}) must be at least 1")
        if any(not text for text in self.stop):
            raise ValueError("stop holds an empty string; leave it out")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken every time."""
        return self.temperature == 0.0


@dataclass(frozen=True, slots=True)
class DecodeRequest:
    """One prompt to continue.

    Raises: ValueError: the prompt is empty.
    """

    request_id: str
    prompt_ids: Sequence[int]
    params: SamplingParams
    domain: str = ""
    tenant: str = ""
    store: bool = True
    """Whether a Trace may be kept."""

    def __post_init__(self) -> None:
        if len(self.prompt_ids) == 0:
            raise ValueError(
                "prompt_ids is empty; a prompt needs at least one token (a begin-of-sequence token will do)"
            )


@dataclass(frozen=True, slots=True)
class RequestStats:
    """Speculation counts of one request. Tokens cut behind a stop count nowhere except in `proposed`.

    `proposed` tokens were proposed in `rounds` rounds, k in each unless the length is chosen; `accepted` of them were
    emitted, and `emitted` tokens in all. `reached_at[i]` proposals at depth i + 1 were judged and the verdict emitted,
    `accepted_at[i]` of them accepted. `draft_version_min/max`: versions of the draft that took part.
    """

    rounds: int
    proposed: int
    accepted: int
    emitted: int
    accepted_at: tuple[int, ...]
    reached_at: tuple[int, ...]
    draft_version_min: int
    draft_version_max: int
    share_at_k: float | None = None
    """accepted / proposed as with k proposals in every round that had any; None where it is that, or there was no such round."""

    @property
    def mal(self) -> float:
        """Mean acceptance length, emitted tokens a round (design section 3); 0.0 before the first round."""
        return self.emitted / self.rounds if self.rounds else 0.0


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of a request. `text` is None without a detokenizer; `token_ids` include the token that ended it."""

    request_id: str
    token_ids: tuple[int, ...]
    text: str | None
    finish_reason: FinishReason
    stats: RequestStats
    trace: Trace | None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Of them, those that the target had read for another prompt."""


@dataclass(frozen=True, slots=True)
class Delta:
    """What one round added to one request. Text that may begin a stop string or a split character is held back."""

    request_id: str
    token_ids: tuple[int, ...]
    text: str
    finished: Finished | None = None
