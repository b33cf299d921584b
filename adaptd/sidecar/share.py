"""Which requests are captured: as many as the server has time for, and no more than the learner can use.

A server pays for log-probabilities in every step in which one request of its batch asked for them, and again for each token
that it writes them for; the proxy pays for reading them. What that costs depends on the server, so it is measured: the time
of a token, regressed on how much of a request's life captured requests were in flight, at like numbers in flight. The cost
is drawn from an account into which `budget` seconds a second are paid. While there is credit every request is captured, one
after the other, because a step with one captured request costs hardly less than a step with all of them; when only what
the last of them will still cost is left, no request is until there is several times as much. So an idle server is captured
whole, and one without a moment to spare for a part of the time.
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

#: Cost that is assumed before anything was measured, as a part of a request's speed, and how many requests' worth of
#: evidence that assumption is.
PRIOR_COST, _PRIOR_WEIGHT = 0.1, 40.0
#: An estimate above this is held for something else that was slow just then, such as a learner on the server's cores: the
#: server must not stop being captured for it.
MAX_COST = 0.3
#: Requests after which what was measured has lost most of its weight.
_MEMORY = 2000.0
#: Seconds of income that the account holds; more where requests are long.
_HOLDS_S = 60.0
#: Lives of a request that are captured without a break must be paid for before the first begins, and may be saved up.
_LIVES, _HOLDS_LIVES = 3.0, 4.0
#: Shortest answer whose speed says something.
_MIN_TOKENS = 8
#: Decisions that the share in force is told from.
_RECENT = 500

#: Why a request is not captured.
BUDGET, LEARNER, LIMIT = "over the budget", "enough for the learner", "not in the share"


@dataclass(slots=True)
class _Sums:
    """Of (x, y) with weights that fade."""

    n: float = 0.0
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0

    def add(self, x: float, y: float) -> None:
        keep = 1.0 - 1.0 / _MEMORY
        self.n, self.x, self.y = keep * self.n + 1, keep * self.x + x, keep * self.y + y
        self.xx, self.xy = keep * self.xx + x * x, keep * self.xy + x * y

    def slope(self, prior: float, weight: float) -> float:
        """Ridge estimate towards `prior`."""
        n = max(self.n, 1.0)
        sxx, sxy = max(0.0, self.xx - self.x**2 / n), self.xy - self.x * self.y / n
        return (sxy + weight * prior) / (sxx + weight)


class CostMeter:
    """What capture costs, as a part of the speed of requests, by how many were in flight: about 1, 2, 4, 8, ..."""

    def __init__(self) -> None:
        self._sums: dict[int, _Sums] = {}

    def add(self, seconds_a_token: float, captured: float, in_flight: float) -> None:
        """One finished request; `captured` is the part of its life in which captured requests were in flight."""
        self._sums.setdefault(_level(in_flight), _Sums()).add(captured, math.log(seconds_a_token))

    def cost(self, in_flight: float) -> float:
        """The estimate at this number; where nothing was measured at it, at the nearest. Within [0.001, `MAX_COST`]."""
        if not self._sums:
            return PRIOR_COST
        here = _level(in_flight)
        sums = self._sums[min(self._sums, key=lambda level: abs(level - here))]
        # A request counts for a quarter where half of them were captured: the variance of x.
        slope = sums.slope(-math.log1p(-PRIOR_COST), _PRIOR_WEIGHT / 4)
        return min(MAX_COST, max(0.001, -math.expm1(-slope)))


def _level(in_flight: float) -> int:
    # Rounded, so that the usual numbers lie in the middle of a level.
    return round(math.log2(max(1.0, in_flight)))


@dataclass(slots=True)
class Ticket:
    """One request on its way."""

    captured: bool
    began: float
    busy: float
    weighted: float


class CaptureShare:
    """Decides request by request. `begin` and `end` come in pairs; all in one thread.

    Args:
      limit: largest share of the requests.
      budget: part of the requests' speed that capture may cost; 0: none are captured, 1: whatever it costs.
      useful: traces that the learner can use in `tick_s` seconds; more are not taken.
      uniform: a random number in [0, 1), for a `limit` below 1.
      clock: seconds, monotonic.
    """

    def __init__(
        self,
        limit: float,
        budget: float,
        useful: float,
        tick_s: float,
        uniform: Callable[[], float],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limit, self._budget, self._useful, self._tick_s = limit, budget, useful, tick_s
        self._uniform, self._clock = uniform, clock
        self.meter = CostMeter()
        self._credit, self._traces, self._at = budget * _HOLDS_S, useful, clock()
        self._in_flight = self._captured = 0
        self._off = ""
        self._life_s = 0.0
        # Integrals over time: of there being captured requests, and of the number in flight.
        self._busy = self._weighted = 0.0
        self._recent: deque[str] = deque(maxlen=_RECENT)

    def why_not(self) -> str | None:
        """Why the next request is not to be captured; None if it is."""
        self._advance()
        why = self._bound()
        self._recent.append(why)
        return why or None

    def begin(self, captured: bool) -> Ticket:
        """A request goes to the server."""
        self._advance()
        self._in_flight += 1
        self._captured += captured
        self._traces -= captured
        return Ticket(captured, self._at, self._busy, self._weighted)

    def end(self, ticket: Ticket, tokens: int) -> None:
        """Its answer is complete, or will never be (`tokens` 0: its speed says nothing)."""
        self._advance()
        self._in_flight -= 1
        self._captured -= ticket.captured
        seconds = self._at - ticket.began
        if tokens >= _MIN_TOKENS and seconds > 0:
            self._life_s += (seconds - self._life_s) / (20 if self._life_s else 1)
            part = (self._busy - ticket.busy) / seconds
            self.meter.add(seconds / tokens, part, (self._weighted - ticket.weighted) / seconds)

    def _bound(self) -> str:
        free, life = self._budget >= 1, self._life
        if self._credit <= life and not free:
            self._off = BUDGET
        elif self._traces < 1:
            self._off = LEARNER
        elif (free or self._credit >= max(self._budget * _HOLDS_S / 2, _LIVES * life)) and (
            self._traces >= self._useful / 2
        ):
            self._off = ""
        return self._off or ("" if self._limit >= 1 or self._uniform() < self._limit else LIMIT)

    @property
    def _life(self) -> float:
        """What a request's life with capture costs at this load, in seconds."""
        return self.meter.cost(self._in_flight) * self._life_s

    def _advance(self) -> None:
        """Bring everything that runs with time up to now."""
        now = self._clock()
        seconds, self._at = now - self._at, now
        self._weighted += seconds * self._in_flight
        self._credit += seconds * self._budget
        if self._captured:
            self._busy += seconds
            self._credit -= seconds * self.meter.cost(self._in_flight)
        self._credit = min(self._credit, max(self._budget * _HOLDS_S, _HOLDS_LIVES * self._life))
        self._traces = min(self._traces + seconds * self._useful / self._tick_s, self._useful)

    def status(self) -> dict[str, Any]:
        """What was decided of the last requests: the share in force (None before one) and what bounds it most often
        (None: nothing); and what capture costs at this load.
        """
        bounds = Counter(why for why in self._recent if why)
        return {
            "in_force": 1 - bounds.total() / len(self._recent) if self._recent else None,
            "bound_by": bounds.most_common(1)[0][0] if bounds else None,
            "cost": self.meter.cost(self._in_flight),
            "limit": self._limit,
            "budget": self._budget,
        }
