"""False alarms and delay of the drift detector, beside a fixed threshold and an exponential average.

    python benchmarks/drift.py                 100,000 stationary requests, 200 switches of each size
    python benchmarks/drift.py --json FILE

A request's value is its acceptance share: proposals accepted out of 60, with a mean of its own (Beta, concentration 10)
around the traffic's 0.5, which is about what medical requests of the pocket pair do. All detectors see the same values.

    adwin        `policies.drift.DriftDetector` at its defaults
    threshold    mean of the last 50 requests below 80 % of the mean of the first 200
    exponential  exponentially weighted average (weight 0.05) more than 4 of its standard deviations below the mean of the
                 first 200 requests, which also give the deviation (Roberts 1959, control charts)

Each starts anew after an alarm. Delay counts requests from the switch to the alarm, over the streams whose alarm came
after the switch and within 1,000 requests; the others are counted as missed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from policies.drift import DriftDetector

MEAN, SPREAD, PROPOSALS = 0.5, 10.0, 60
DROPS = (0.1, 0.25, 0.5)
BEFORE, AFTER = 500, 1000


class Detector(Protocol):
    """One detector of falling acceptance."""

    def __call__(self, value: float) -> bool:
        """Whether this request completes an alarm."""


class Adwin:
    """The one that adaptd runs; only falls are alarms here."""

    def __init__(self) -> None:
        self._detector = DriftDetector()

    def __call__(self, value: float) -> bool:
        event = self._detector.update("all", value)
        return event is not None and event.direction == "drop"


class Threshold:
    """Mean of a sliding window against a share of the first requests' mean."""

    def __init__(self, window: int = 50, first: int = 200, share: float = 0.8) -> None:
        self._window, self._first, self._share = window, first, share
        self._values: list[float] = []

    def __call__(self, value: float) -> bool:
        self._values.append(value)
        if len(self._values) <= self._first:
            return False
        bound = self._share * float(np.mean(self._values[: self._first]))
        if np.mean(self._values[-self._window :]) >= bound:
            return False
        self._values.clear()
        return True


class Exponential:
    """Exponentially weighted moving average with control limits."""

    def __init__(self, weight: float = 0.05, first: int = 200, limit: float = 4.0) -> None:
        self._weight, self._first, self._limit = weight, first, limit
        self._values: list[float] = []
        self._average = 0.0

    def __call__(self, value: float) -> bool:
        if len(self._values) < self._first:
            self._values.append(value)
            self._average = float(np.mean(self._values))
            return False
        self._average += self._weight * (value - self._average)
        deviation = float(np.std(self._values)) * (self._weight / (2 - self._weight)) ** 0.5
        if self._average >= np.mean(self._values) - self._limit * deviation:
            return False
        self._values.clear()
        return True


DETECTORS: dict[str, Callable[[], Detector]] = {"adwin": Adwin, "threshold": Threshold, "exponential": Exponential}


def shares(rng: np.random.Generator, mean: float, n: int) -> NDArray[np.float64]:
    """Acceptance shares of n requests."""
    own = rng.beta(mean * SPREAD, (1 - mean) * SPREAD, n)
    found: NDArray[np.float64] = rng.binomial(PROPOSALS, own) / PROPOSALS
    return found


def false_alarms(make: Callable[[], Detector], requests: int) -> int:
    """Alarms on stationary traffic."""
    detector = make()
    return sum(detector(float(v)) for v in shares(np.random.default_rng(1), MEAN, requests))


def delays(make: Callable[[], Detector], drop: float, streams: int) -> tuple[list[int], int]:
    """Requests from a switch to its alarm, and how many switches were missed."""
    found, missed = [], 0
    for seed in range(streams):
        rng = np.random.default_rng([seed, round(100 * drop)])
        values = np.concatenate([shares(rng, MEAN, BEFORE), shares(rng, MEAN * (1 - drop), AFTER)])
        detector = make()
        alarms = [i for i, value in enumerate(values) if detector(float(value))]
        after = [i - BEFORE + 1 for i in alarms if i >= BEFORE]
        if after:
            found.append(after[0])
        else:
            missed += 1
    return found, missed


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    print(f"{'detector':12} {'false alarms':>12}  delay: median / 90 % / missed, for falls of {DROPS}")
    for name, make in DETECTORS.items():
        row = {"detector": name, "false_alarms": false_alarms(make, options.requests), "requests": options.requests}
        cells = []
        for drop in DROPS:
            found, missed = delays(make, drop, options.streams)
            median, late = (float(np.quantile(found, q)) if found else None for q in (0.5, 0.9))
            row[f"drop_{drop}"] = {"median": median, "p90": late, "missed": missed, "streams": options.streams}
            cells.append(f"{median or '-'} / {late or '-'} / {missed}")
        rows.append(row)
        print(f"{name:12} {row['false_alarms']:>12}  " + "   ".join(cells), flush=True)
    if options.json:
        options.json.write_text(json.dumps({"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
