"""Live acceptance: fixed-memory windows over finished requests, by domain, with drift detection.

Minute buckets give the last hour and day; the last requests of a domain give "now" and the sparkline.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from policies.drift import DriftDetector, DriftEvent
from policies.watch import Window, window

FloatArray = NDArray[np.float64]

#: Requests of one domain that "now" and the sparkline look at.
_RECENT = 640
_NOW = 100
_SPARK = 32
_MINUTES = 24 * 60
#: Domains told apart; any further one is counted as `other`, so that a client cannot grow the daemon's memory.
_MAX_DOMAINS = 64
#: The traffic as a whole, in drift events: a change of mixture moves it though every domain stands still.
ALL = "all"


@dataclass(frozen=True, slots=True)
class Finished:
    """What the monitor keeps of one finished request."""

    domain: str
    emitted: int
    rounds: int
    proposed: int
    accepted: int
    reached_at: tuple[int, ...]
    accepted_at: tuple[int, ...]
    draft_version: int
    share_at_k: float | None = None
    """accepted / proposed as with one length of draft, where lengths were chosen (`RequestStats.share_at_k`)."""

    @property
    def share(self) -> float | None:
        """Acceptance share that requests are compared by, within [0, 1]; None if nothing was proposed."""
        if self.share_at_k is not None or not self.proposed:
            return self.share_at_k
        return min(1.0, self.accepted / self.proposed)


def record_sums(item: Finished, k: int) -> FloatArray:
    """One request as a vector that adds up: requests, emitted, rounds, proposed, accepted, reached[k], accepted_at[k]."""
    head = [1, item.emitted, item.rounds, item.proposed, item.accepted]
    depth = np.zeros(2 * k)
    depth[: len(item.reached_at)] = item.reached_at
    depth[k : k + len(item.accepted_at)] = item.accepted_at
    return np.concatenate([head, depth])


def summarise(sums: FloatArray, k: int) -> dict[str, Any]:
    """Metrics of design section 3 from summed counts; a ratio without a denominator is None."""
    requests, emitted, rounds, proposed, accepted = sums[:5]
    reached, passed = sums[5 : 5 + k], sums[5 + k :]
    return {
        "requests": int(requests),
        "tokens": int(emitted),
        "rounds": int(rounds),
        "mal": float(emitted / rounds) if rounds else None,
        "token_acceptance": float(accepted / proposed) if proposed else None,
        "draft_length": float(proposed / rounds) if rounds else None,
        "block_acceptance": float(passed[-1] / rounds) if rounds else None,
        "by_depth": [float(a / r) if r else None for a, r in zip(passed, reached, strict=True)],
    }


class Monitor:
    """Windows and drift state; one owner, not thread-safe.

    Args:
      k: tokens proposed a round.
      delta: significance of an ADWIN cut.
      clock: seconds since the epoch.
    """

    def __init__(self, k: int, delta: float, clock: Callable[[], float] = time.time) -> None:
        self._k, self._clock = k, clock
        self._minutes: deque[tuple[int, str, FloatArray]] = deque()
        self._recent: dict[str, deque[FloatArray]] = {}
        self._shares: dict[str, deque[float | None]] = {}
        self._drift = DriftDetector(delta=delta)
        self._totals: dict[str, FloatArray] = {}
        self.drifts: dict[str, int] = {}
        self.drift_events: deque[dict[str, Any]] = deque(maxlen=64)

    def observe(self, item: Finished) -> list[DriftEvent]:
        """Count one finished request; drift of its domain, and of the traffic as a whole (domain `all`)."""
        domain = item.domain if item.domain in self._recent or len(self._recent) < _MAX_DOMAINS else "other"
        sums = record_sums(item, self._k)
        self._totals[domain] = self._totals.get(domain, np.zeros_like(sums)) + sums
        self._recent.setdefault(domain, deque(maxlen=_RECENT)).append(sums)
        self._add_to_minute(domain, sums)
        share = item.share
        self._shares.setdefault(domain, deque(maxlen=_NOW)).append(share)
        if share is None:
            return []
        found = [e for e in (self._drift.update(name, share) for name in (domain, ALL)) if e is not None]
        for event in found:
            self.drifts[event.domain] = self.drifts.get(event.domain, 0) + 1
            self.drift_events.append(
                {
                    "at": self._clock(),
                    "domain": event.domain,
                    "direction": event.direction,
                    "before": event.before,
                    "after": event.after,
                }
            )
        return found

    def _add_to_minute(self, domain: str, sums: FloatArray) -> None:
        minute = int(self._clock() // 60)
        while self._minutes and self._minutes[0][0] <= minute - _MINUTES:
            self._minutes.popleft()
        for when, name, total in reversed(self._minutes):
            if when != minute:
                break
            if name == domain:
                total += sums
                return
        self._minutes.append((minute, domain, sums.copy()))

    def window(self, seconds: float, domain: str | None = None) -> dict[str, Any]:
        """Summary of the last `seconds` (whole minutes)."""
        first = (self._clock() - seconds) // 60
        return self._summary(s for when, name, s in self._minutes if when >= first and domain in (None, name))

    def _summary(self, items: Iterable[FloatArray]) -> dict[str, Any]:
        return summarise(sum(items, np.zeros(5 + 2 * self._k)), self._k)

    def now(self, domain: str | None = None) -> dict[str, Any]:
        """Summary of the last hundred requests of a domain, or of all domains together."""
        names = [domain] if domain is not None else list(self._recent)
        return self._summary(s for name in names for s in list(self._recent.get(name, ()))[-_NOW:])

    def windows(self) -> dict[str, Window]:
        """Acceptance share per request over the last hundred requests of each domain that has enough of them."""
        found: dict[str, Window] = {}
        for name, shares in self._shares.items():
            if (known := window([share for share in shares if share is not None])) is not None:
                found[name] = known
        return found

    def sparkline(self, domain: str) -> list[float]:
        """MAL over the domain's recent requests, oldest first, in at most 32 chunks."""
        items = list(self._recent.get(domain, ()))
        chunks = np.array_split(np.arange(len(items)), min(_SPARK, len(items))) if items else []
        return [float(t[1] / t[2]) for t in (sum(items[i] for i in chunk) for chunk in chunks) if t[2]]

    def totals(self) -> dict[str, dict[str, float]]:
        """Counts since start, by domain: requests, tokens, rounds, proposed, accepted."""
        names = ("requests", "tokens", "rounds", "proposed", "accepted")
        return {domain: dict(zip(names, map(float, sums[:5]), strict=True)) for domain, sums in self._totals.items()}

    def depths(self) -> dict[str, dict[str, list[float]]]:
        """Counts since start, by domain: proposals reached and accepted at each depth, [k] both."""
        k = self._k
        return {
            domain: {"reached": sums[5 : 5 + k].tolist(), "accepted": sums[5 + k :].tolist()}
            for domain, sums in self._totals.items()
        }

    def status(self) -> dict[str, Any]:
        """Everything `adaptd status` shows of acceptance and drift, as JSON values."""
        return {
            "total": self._summary(self._totals.values()),
            "now": self.now(),
            "1h": self.window(3600),
            "24h": self.window(86400),
            "domains": {
                name: {
                    "now": self.now(name),
                    "1h": self.window(3600, name),
                    "24h": self.window(86400, name),
                    "sparkline": self.sparkline(name),
                }
                for name in self._recent
            },
            "drift": {"state": self._drift.state(), "events": list(self.drift_events)},
        }
