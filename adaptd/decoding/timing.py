"""What one draft step and one target pass cost at the present batch: the ratios of `policies.economics`.

Timed between two rounds, on the rows as they are. A pass writes the cache where the next round writes again, so nothing
that is decoded changes; decoding waits for about three rounds. Nothing is timed inside a round: that would make the host
wait for the device.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

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
    """The draft, one position."""
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


@torch.inference_mode()
def measure(engine: SpeculativeDecoder, clock: Callable[[], float] = time.perf_counter) -> StepTimes | None:
    """Time the passes; None if prompts are being read and no row is active. Called by the thread that owns the engine."""
    rows = list(engine._rows)
    if not rows:
        if engine.active:
            return None
        length = min(_IDLE_LENGTH, engine.max_length - 1)
        engine._prefill.forget(0)  # that row's passes write there
        rows = [Row(DecodeRequest("calibration", (0,) * length, SamplingParams(max_tokens=1)), None)]
    k, device = engine.k, engine.device
    n = torch.tensor([len(row.tokens) for row in rows], device=device)
    # A round feeds the last known token at n-1 and its proposals behind it; which tokens they are costs nothing.
    positions = n[:, None] + torch.arange(-1, k, device=device)
    tokens = torch.tensor([[row.tokens[-1]] * (k + 1) for row in rows], device=device)
    length = round_up(max(len(row.tokens) for row in rows) + k)

    def timed(drafting: bool, first: int, last: int) -> float:
        runner = engine._draft if drafting else engine._target
        fed = engine._drafter.known(tokens) if drafting else tokens
        if drafting:
            runner.open_to(rows)
        masks = runner.masks(positions[:, first:last], length)
        best = float("inf")
        for attempt in range(_REPEATS + 1):  # the first warms up
            _wait_for(device)
            started = clock()
            runner.forward(
                fed[:, first:last],
                positions[:, first:last],
                masks,
                0,
                length,
                last_only=last - first == 1,
                of_round=True,
            )
            _wait_for(device)
            if attempt:
                best = min(best, clock() - started)
        return best

    # Positions n-1 to n+k-1 of the caches are written, all of which the next round writes before it reads them.
    return StepTimes(
        batch=len(rows),
        k=k,
        draft_s=timed(True, 1, 2),
        target_s=timed(False, 0, 1),
        verify_s=timed(False, 0, k + 1),
    )


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
