"""What a decode loop says of itself. Plain values."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class SwapResult:
    """What a swap did: the version now in the weights, and (filled in by the loop) how long decoding stood still."""

    version: int
    tensors: int = 0
    bytes: int = 0
    pause_s: float = 0.0


@dataclass(frozen=True, slots=True)
class LoopStats:
    """Counts since start, and what is going on now. MAL is `emitted / row_rounds`."""

    queued: int
    active: int
    draft_version: int
    steps: int
    step_s: float
    row_rounds: int
    proposed: int
    accepted: int
    emitted: int
    finished: int
    aborted: int
    failed: int
    callback_errors: int
    swaps: int
    swap_refusals: int
    last_pause_s: float
    max_pause_s: float
    again: int = 0
    """Answers that were given again while nobody asked; they count nowhere else."""
    alternatives: int = 0
    """Traces whose alternatives the target was asked about while nobody asked."""
    held: int = 0
    """Traces that wait for that."""
    recalled: int = 0
    """Contexts in the decoder's recall."""
    round_s: float | None = None
    """Median of the last steps' seconds, and their median batch."""
    round_batch: float | None = None
    draft_lengths: dict[str, int] = field(default_factory=dict)
    """The k chosen last, by domain; empty where it is fixed."""
