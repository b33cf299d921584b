"""What a round of each draft length takes, from rounds as they ran: the denominator of S = MAL / (1 + k c_d + c_v).

Whole rounds are timed, so sampling, recall and capture count as well as the passes of the two models. Only ratios between
lengths are asked for. They are kept for each size of batch (by powers of two), because verifying many positions of many
rows is no longer bound by memory, and they must not take a busy machine for a dear length: a learner on the same cores
slows all lengths alike. So the lengths are first timed in turns, and later ones against the rounds just before:

    shape[k]   median of a length's last times, each divided by the load that it met
    load       median of the last ordinary rounds' time / shape: what else the machine did meanwhile

Only trials change a shape; ordinary rounds, all of one length, cannot be told from load.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from statistics import median

#: Times of each length before a batch's shape is used.
REPEATS = 4
#: Times of a length that its shape is the median of, and ordinary rounds that the load is the median of.
_TIMES, _LOADS = 8, 16


@dataclass(slots=True)
class _Batch:
    """One size of batch."""

    times: list[deque[float]]
    shape: list[float] = field(default_factory=list)
    loads: deque[float] = field(default_factory=lambda: deque(maxlen=_LOADS))
    timed_at: list[int] = field(default_factory=list)
    rounds: int = 0


class RoundCosts:
    """Times of the lengths 0 to `k_max`, by size of batch. Not safe for several threads.

    Raises: ValueError: k_max below 1.
    """

    def __init__(self, k_max: int) -> None:
        if k_max < 1:
            raise ValueError(f"k_max ({k_max}) must be at least 1")
        self._k_max = k_max
        self._batches: dict[int, _Batch] = {}

    def due(self, batch: int) -> int | None:
        """The length to time next before anything is known of such a batch; None once its shape is known."""
        found = self._of(batch)
        if found.shape:
            return None
        # The longest first, in turns: what changes meanwhile meets all of them.
        return min(range(self._k_max, -1, -1), key=lambda k: len(found.times[k]))

    def put(self, batch: int, k: int, seconds: float, *, trial: bool) -> None:
        """A round that ran. `trial`: not of the length that is ordinary now, but to see what it takes."""
        found = self._of(batch)
        found.rounds += 1
        if not found.shape:
            found.times[k].append(seconds)
            found.timed_at[k] = found.rounds
            if min(len(times) for times in found.times) >= REPEATS:
                found.shape = [median(times) for times in found.times]
        elif trial:
            found.times[k].append(seconds / (median(found.loads) if found.loads else 1.0))
            found.shape[k] = median(found.times[k])
            found.timed_at[k] = found.rounds
        else:
            found.loads.append(seconds / found.shape[k])

    def ratios(self, batch: int) -> list[float]:
        """[k_max + 1] price of a round of each length, in rounds without a draft.

        Raises: ValueError: `due` is not None.
        """
        shape = self._of(batch).shape
        if not shape:
            raise ValueError(f"batch ({batch}) was not timed yet; play the lengths that are due first")
        return [seconds / shape[0] for seconds in shape]

    def stalest(self, batch: int, but: int) -> int:
        """The length timed longest ago, other than `but`."""
        timed_at = self._of(batch).timed_at
        return min((k for k in range(self._k_max + 1) if k != but), key=timed_at.__getitem__)

    def _of(self, batch: int) -> _Batch:
        size = max(1, batch).bit_length()
        if size not in self._batches:
            lengths = self._k_max + 1
            self._batches[size] = _Batch([deque(maxlen=_TIMES) for _ in range(lengths)], timed_at=[0] * lengths)
        return self._batches[size]
