"""What a proposal and a target pass cost at the present batch: the ratios of `policies.economics`.

Timed between two rounds, on the rows as they are, in the order of a round: behind a target pass the caches of a CPU hold
little of the draft. A pass writes the cache where the next round writes again, so nothing that is decoded changes; decoding
waits for about eight rounds. Nothing is timed inside a round: that would make the host wait for the device.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from adaptd.decoding.engine import SpeculativeDecoder
from adaptd.decoding.request import DecodeRequest, SamplingParams
from adaptd.decoding.row import Row
from adaptd.models.cache import round_up

#: Passes of each kind of which the fastest counts: what else the machine does only ever adds.
_REPEATS = 3
#: Length of the row that stands for a request where there is none, in tokens.
_IDLE_LENGTH = 32
#: Seconds after which figures of a batch are measured again.
_OLD_S = 600.0


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Seconds of one pass over the whole batch."""

    batch: int
    k: int
    draft_s: float
    """A proposal: a round's k passes of the draft, the choice of each token and the recall, over k."""
    target_s: float
    """The target, one position: a step without speculation."""
    verify_s: float
    """The target, k + 1 positions."""


class Calibration:
    """The figures of each size of batch, by powers of two, and when to measure anew."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._found: dict[int, tuple[float, StepTimes]] = {}

    def due(self, batch: int) -> bool:
        """Whether nothing recent is known of such a batch."""
        known = self._found.get(max(1, batch).bit_length())
        return known is None or self._clock() - known[0] > _OLD_S

    def put(self, times: StepTimes) -> None:
        """Keep what was measured."""
        self._found[times.batch.bit_length()] = (self._clock(), times)

    def all(self) -> list[StepTimes]:
        """By batch, smallest first."""
        return [times for _, (_, times) in sorted(self._found.items())]


def measure(engine: SpeculativeDecoder, clock: Callable[[], float] = time.perf_counter) -> StepTimes | None:
    """Time the passes; None if prompts are being read and no row is active. Called by the thread that owns the engine."""
    if engine._rows:
        return _timed(engine, clock)
    if engine.active:
        return None
    length = min(_IDLE_LENGTH, engine.max_length - 1)
    engine._prefill.forget(0)  # the row's passes write there
    engine._rows.append(Row(DecodeRequest("calibration", (0,) * length, SamplingParams(max_tokens=1)), None))
    engine._stale = True
    try:
        return _timed(engine, clock)
    finally:
        engine._rows.clear()
        engine._stale = True


@torch.inference_mode()
def _timed(engine: SpeculativeDecoder, clock: Callable[[], float]) -> StepTimes:
    if engine._stale:
        engine._rebuild()
    k, device, rows, params = engine.k, engine.device, engine._rows, engine._params
    # Positions n-1 to n+k-1 of the caches are written, all of which the next round writes before it reads them.
    positions = (engine._n[:, None] + engine._offsets).clamp(min=0)
    length = round_up(max(len(row.tokens) for row in rows) + k)
    # Which tokens the target is fed costs nothing; nor which numbers decide, and those of the rows are not used up.
    tokens = engine._last_two[:, 1:].expand(-1, k + 1)
    uniforms = torch.zeros(len(rows), k, device=device)
    engine._draft.open_to(rows)

    def target(width: int) -> None:
        fed = positions[:, 1 : 1 + width]
        masks = engine._target.masks(fed, length)
        engine._target.forward(tokens[:, :width], fed, masks, 0, length, last_only=width == 1, of_round=True)

    def propose() -> None:
        masks = engine._draft.masks(positions, length)
        engine._drafter.propose(k, engine._n, engine._last_two, positions, masks, length, uniforms, params)

    passes: tuple[Callable[[], None], ...] = (partial(target, 1), partial(target, k + 1), propose)
    best = [math.inf] * len(passes)
    for attempt in range(_REPEATS + 1):  # the first warms up
        for at, run in enumerate(passes):
            _wait_for(device)
            started = clock()
            run()
            _wait_for(device)
            if attempt:
                best[at] = min(best[at], clock() - started)
    target_s, verify_s, proposals_s = best
    return StepTimes(len(rows), k, proposals_s / k, target_s, verify_s)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
