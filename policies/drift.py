"""Drift of acceptance, per domain: river's ADWIN over the acceptance share of each request.

ADWIN (Bifet and Gavalda 2007) keeps the longest window in which no two parts have significantly different means. When
two parts have, that is a drift: a *drop* says that traffic left the draft behind, a *rise* that a better draft (or
easier traffic) arrived. ADWIN then gives up only as much of the old as it must, so one change would be reported several
times with diluted means, and river's starts from nothing at the next value. Here the change is located in the window by
least squares (the split with the most variance between its parts), and the part after it seeds the next window: one
event for an abrupt change, with the means before and after it, and a second change is measured against the first.

Measured for Beta-distributed shares at the defaults (a test repeats it): a stationary stream of 500 requests raises no
drift in 60 of 60 seeds; a fall of the mean from 0.50 to 0.25 is found after a median of 20 requests.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from river.drift import ADWIN

Direction = Literal["drop", "rise"]

#: Requests between two checks of a domain: ADWIN's `clock`. A check costs microseconds; river's 32 adds delay.
CHECK_EVERY = 4
#: Most values of a domain kept to seed a window after a drift or a restart; more of ADWIN's window is forgotten then.
RECENT_VALUES = 512
#: Fewest requests on each side of a change: ADWIN's `min_window_length`.
MIN_SIDE = 5
#: Decimals of the values in a snapshot: far below the noise of one request, and short in JSON.
SNAPSHOT_DECIMALS = 4


@dataclass(frozen=True, slots=True)
class DriftEvent:
    """Acceptance of a domain changed for good."""

    domain: str
    direction: Direction
    #: Mean acceptance of the window's requests before the change and after it.
    before: float
    after: float
    #: Requests of the domain seen so far, and how many of them came after the change.
    n: int
    width: int


class _Window(Protocol):
    """What is used of river's ADWIN, which carries no types of its own."""

    @property
    def width(self) -> float: ...
    @property
    def estimation(self) -> float: ...
    @property
    def drift_detected(self) -> bool: ...
    def update(self, x: float) -> object: ...


@dataclass(slots=True)
class _Domain:
    window: _Window
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT_VALUES))
    n: int = 0
    drifted_at: int | None = None


class DriftDetector:
    """One ADWIN per domain, made when the domain is first seen. Not thread-safe: one owner updates it."""

    def __init__(self, *, delta: float = 0.5, warmup: int = 30) -> None:
        """A detector without any domain yet.

        Args:
          delta: ADWIN's confidence: bound on the probability that a check errs. It is loose: at 0.5, with a check every
            4 requests, 5 in 100,000 stationary requests raise an alarm (`benchmarks/drift.py`); at 0.02 none does, and
            changes are found in twice the time.
          warmup: requests of a domain before its first check, at least 1.

        Raises: ValueError: delta outside (0, 1), warmup below 1.
        """
        if not 0.0 < delta < 1.0:
            raise ValueError(f"delta ({delta}) must be strictly between 0 and 1")
        if warmup < 1:
            raise ValueError(f"warmup ({warmup}) must be at least 1 request")
        self._delta = delta
        self._warmup = warmup
        self._domains: dict[str, _Domain] = {}

    def update(self, domain: str, value: float) -> DriftEvent | None:
        """Add the acceptance share (accepted / proposed) of one request.

        Returns: the drift that this request completes, else None.
        Raises: ValueError: value outside [0, 1] or NaN; the state is unchanged.
        """
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"value ({value}) must be an acceptance share within [0, 1]")
        entry = self._domains.get(domain)
        if entry is None:
            entry = self._domains[domain] = _Domain(self._new_window())
        old_width = int(entry.window.width)
        entry.window.update(value)
        entry.recent.append(value)
        entry.n += 1
        if not entry.window.drift_detected:
            return None
        values = list(entry.recent)[-(old_width + 1) :]
        split = _change_point(values)
        older, newer = values[:split], values[split:]
        before, after = math.fsum(older) / len(older), math.fsum(newer) / len(newer)
        entry.drifted_at = entry.n
        entry.window = self._seeded(newer)
        return DriftEvent(domain, "drop" if after < before else "rise", before, after, entry.n, len(newer))

    def state(self) -> dict[str, dict[str, float | int | None]]:
        """Per domain: `mean` acceptance of the window, `n` requests seen, `drifted_at` the n of the last drift."""
        return {
            domain: {"mean": entry.window.estimation, "n": entry.n, "drifted_at": entry.drifted_at}
            for domain, entry in self._domains.items()
        }

    def snapshot(self) -> dict[str, dict[str, Any]]:
        """JSON-serialisable summary: per domain `n`, `drifted_at` and the `recent` shares of the window."""
        return {
            domain: {
                "n": entry.n,
                "drifted_at": entry.drifted_at,
                "recent": [
                    round(value, SNAPSHOT_DECIMALS) for value in list(entry.recent)[-max(1, int(entry.window.width)) :]
                ],
            }
            for domain, entry in self._domains.items()
        }

    def restore(self, snapshot: Mapping[str, Mapping[str, Any]]) -> None:
        """Replace all state by a snapshot's; the windows are rebuilt from its recent shares.

        Raises: ValueError: not a snapshot of this class; the state is unchanged.
        """
        domains: dict[str, _Domain] = {}
        for domain, summary in snapshot.items():
            try:
                recent = [float(value) for value in summary["recent"]]
                n = int(summary["n"])
                drifted_at = None if summary["drifted_at"] is None else int(summary["drifted_at"])
            except (KeyError, TypeError, ValueError) as exc:
                raise ValueError(f"snapshot of domain ({domain!r}) must hold n, drifted_at and recent") from exc
            if not all(math.isfinite(value) and 0.0 <= value <= 1.0 for value in recent):
                raise ValueError(f"snapshot of domain ({domain!r}) must hold shares within [0, 1]")
            recent = recent[-RECENT_VALUES:]
            domains[domain] = _Domain(self._seeded(recent), deque(recent, maxlen=RECENT_VALUES), n, drifted_at)
        self._domains = domains

    def _new_window(self) -> _Window:
        window: _Window = ADWIN(  # type: ignore[no-untyped-call]  # river has no annotation on its constructor
            delta=self._delta, clock=CHECK_EVERY, grace_period=self._warmup, min_window_length=MIN_SIDE
        )
        return window

    def _seeded(self, values: list[float]) -> _Window:
        """A window over `values`. They were judged before: a change found among them restarts it without an event."""
        window = self._new_window()
        for count, value in enumerate(values, start=1):
            window.update(value)
            if window.drift_detected:
                return self._seeded(values[_change_point(values[:count]) :])
        return window


def _change_point(values: list[float]) -> int:
    """Length of the older part at the split with the largest between-part variance, n0 n1 / n (mean0 - mean1)^2.

    The maximum-likelihood change of the mean for a constant variance; both parts have at least `MIN_SIDE` values.
    """
    sums = np.cumsum(values)
    total = len(values)
    older = np.arange(MIN_SIDE, total - MIN_SIDE + 1)
    newer = total - older
    at = sums[older - 1]
    between = older * newer / total * (at / older - (sums[-1] - at) / newer) ** 2
    return int(older[int(np.argmax(between))])
