"""Whether a candidate draft may replace the incumbent, and whether it keeps its promise in live traffic.

Before promotion, `judge`: candidate and incumbent are scored on the *same* traces, and a bootstrap that resamples whole
traces, always the same ones for both, gives an interval of the relative gain in mean acceptance length (MAL). Pairing
takes out what makes one trace easier than another, which is most of the variance. After promotion, `LiveWatch`: a
sequential test that may be looked at after every request without raising its false-alarm rate.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
WatchState = Literal["watching", "worse", "confirmed"]

#: Stratum whose traces decide the gain: the reserved traces of the recent window, which no learner ever sees.
GAIN_STRATUM = "reserved"
#: Elements of the resampling matrix held at once (16 MiB of float64).
_RESAMPLE_ELEMENTS = 1 << 21
#: Bets of `LiveWatch`, as fractions of the largest bet that cannot lose everything: small ones win on small, noisy
#: differences, large ones on gross ones, and the average over them loses at most log(8) nats to the best.
_BETS = tuple(float(bet) for bet in np.geomspace(0.01, 0.9, 8))
#: Distance from 0 and 1 that a tested mean keeps, so that bets are finite.
_MEAN_MARGIN = 0.01


@dataclass(frozen=True, slots=True)
class Interval:
    """A point estimate within its interval. NaN bounds: there is too little to tell."""

    mean: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float | None]:
        """For JSON: {"mean", "low", "high"}, unknown as None."""
        values = {"mean": self.mean, "low": self.low, "high": self.high}
        return {name: value if math.isfinite(value) else None for name, value in values.items()}


_UNKNOWN = Interval(math.nan, math.nan, math.nan)


@dataclass(frozen=True, slots=True)
class Score:
    """What one draft makes of one trace, e.g. `emitted` and `rounds` of `policies.acceptance.Profile`."""

    domain: str
    #: Stratum of the replay table that the trace is from: "reserved" or "anchors".
    stratum: str
    #: Tokens.
    emitted: float
    #: Expected rounds to emit them, above 0.
    rounds: float

    def __post_init__(self) -> None:
        if not (self.emitted > 0.0 and math.isfinite(self.emitted)):
            raise ValueError(f"emitted ({self.emitted}) must be finite and above 0; leave empty traces out")
        if not (self.rounds > 0.0 and math.isfinite(self.rounds)):
            raise ValueError(f"rounds ({self.rounds}) must be finite and above 0; leave empty traces out")


@dataclass(frozen=True, slots=True)
class Verdict:
    """The gate's answer, kept in the checkpoint's manifest."""

    promote: bool
    #: One sentence with the numbers that decided.
    reason: str
    #: Relative gain in MAL on the traces that decide it.
    gain: Interval
    #: Relative gain per domain, over the traces of all strata.
    by_domain: dict[str, Interval]
    #: Traces that decided the gain.
    n: int
    #: Domains that lose more than is allowed, whether or not the gain is sure.
    losers: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, object]:
        """For JSON and the manifest."""
        return {
            "promote": self.promote,
            "reason": self.reason,
            "gain": self.gain.as_dict(),
            "by_domain": {domain: interval.as_dict() for domain, interval in self.by_domain.items()},
            "n": self.n,
            "losers": list(self.losers),
        }


def paired_bootstrap(
    candidate: Sequence[Score],
    incumbent: Sequence[Score],
    rng: np.random.Generator,
    resamples: int = 1000,
    level: float = 0.95,
) -> Interval:
    """Relative gain MAL_candidate / MAL_incumbent - 1 with its percentile interval (Efron and Tibshirani 1993, ch. 13).

    MAL is a ratio of sums, so sums are formed anew in each resample. `mean` is the gain on the traces as they are.

    Args:
      candidate, incumbent: [N] scores of the same traces in the same order.
      rng: drives the resampling.
      resamples: bootstrap samples, at least 1.
      level: coverage of the two-sided interval; `low` alone is a bound at (1 + level) / 2.

    Returns: the interval; NaN bounds for a single trace, whose resamples cannot vary.
    Raises: ValueError: no scores, scores that do not pair up, resamples or level out of range.
    """
    require_pairs(candidate, incumbent)
    if resamples < 1:
        raise ValueError(f"resamples ({resamples}) must be at least 1")
    if not 0.0 < level < 1.0:
        raise ValueError(f"level ({level}) must be strictly between 0 and 1")
    n = len(candidate)
    if n == 0:
        raise ValueError("scores (none) must hold at least one trace")
    counts = np.array(
        [(c.emitted, c.rounds, i.emitted, i.rounds) for c, i in zip(candidate, incumbent, strict=True)],
        dtype=np.float64,
    )
    mean = float(_relative_gain(counts.sum(0)))
    if n == 1:
        return Interval(mean, math.nan, math.nan)
    block = max(1, _RESAMPLE_ELEMENTS // n)
    gains = []
    for start in range(0, resamples, block):
        # How often each trace is drawn in each resample, [block, N]; the same for both drafts: that is the pairing.
        draws = rng.multinomial(n, np.full(n, 1.0 / n), size=min(block, resamples - start))
        gains.append(_relative_gain(draws.astype(np.float64) @ counts))
    low, high = np.quantile(np.concatenate(gains), [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    return Interval(mean, float(low), float(high))


def judge(
    candidate: Sequence[Score],
    incumbent: Sequence[Score],
    *,
    min_gain: float,
    max_regression: float,
    min_traces: int,
    rng: np.random.Generator,
    resamples: int = 1000,
    level: float = 0.95,
    gain_stratum: str = GAIN_STRATUM,
    floor: Sequence[Score] | None = None,
    exchange: float = 0.0,
    gone: Collection[str] = (),
    gone_loss: float = 0.0,
) -> Verdict:
    """Promote if the gain's lower bound is above `min_gain` and no domain loses more than `max_regression`.

    A domain that is not asked at present may lose more, up to `exchange` of what is surely gained: what it had won over
    the floor is worth less than twice as fast an answer to what is asked now, and replay brings it back.

    The gain is measured on the traces of `gain_stratum` only. Regressions are measured per domain on the traces of all
    strata together, and by the point estimate: an interval's lower bound would let noise veto every small domain, its
    upper bound would let a real loss through until it is proven. A domain with fewer than `min_traces` traces cannot
    veto; the reason names it.

    Small losses add up: each of ten versions may lose a little against the one before it. `floor` stops that: a domain
    more than `max_regression` below it vetoes as well, unless the candidate is better there than the incumbent, which
    is on the way back.

    A draft that serves every request alike and learns what is asked now can seldom keep all of what is not. A domain whose
    traffic is gone may therefore be `gone_loss` below the floor, and is held to that alone as long as the incumbent has
    not won more than that there.

    Args:
      candidate, incumbent: [N] scores of the same traces in the same order; reserved traces of the recent window, and
        anchors of every domain.
      min_gain: relative, e.g. 0.01 for 1 %.
      max_regression: relative, at least 0, e.g. 0.02 for 2 %.
      min_traces: traces needed to decide the gain, and for a domain to veto; at least 2.
      rng, resamples, level: of the bootstrap.
      gain_stratum: whose traces decide the gain.
      floor: [N] scores of the draft that no domain may fall below, usually that of day 0; None: no such draft.
      exchange: loss that a sure gain of 1 makes up for, at least 0; 0: a loss is a loss.
      gone: domains that are not asked any more (`policies.floor.gone`).
      gone_loss: how far below the floor they may be, where that is more than `max_regression`.

    Raises: ValueError: scores that do not pair up, or a limit out of range.
    """
    require_pairs(candidate, incumbent)
    if floor is not None:
        require_pairs(candidate, floor)
    if not math.isfinite(min_gain):
        raise ValueError(f"min_gain ({min_gain}) must be finite")
    if not max_regression >= 0.0:
        raise ValueError(f"max_regression ({max_regression}) must be at least 0")
    if not exchange >= 0.0:
        raise ValueError(f"exchange ({exchange}) must be at least 0")
    if not gone_loss >= 0.0:
        raise ValueError(f"gone_loss ({gone_loss}) must be at least 0")
    if min_traces < 2:
        raise ValueError(f"min_traces ({min_traces}) must be at least 2: one trace has no interval")

    def interval(rows: Sequence[int]) -> Interval:
        if not rows:
            return _UNKNOWN
        return paired_bootstrap([candidate[r] for r in rows], [incumbent[r] for r in rows], rng, resamples, level)

    deciding: list[int] = []
    domains: defaultdict[str, list[int]] = defaultdict(list)
    for row, score in enumerate(candidate):
        domains[score.domain].append(row)
        if score.stratum == gain_stratum:
            deciding.append(row)
    gain = interval(deciding)
    by_domain = {domain: interval(rows) for domain, rows in sorted(domains.items())}
    judged = {domain: by_domain[domain] for domain in by_domain if len(domains[domain]) >= min_traces}
    allowed = max(max_regression, exchange * gain.low) if math.isfinite(gain.low) else max_regression
    limits = dict.fromkeys(judged, max_regression)
    spared: set[str] = set()
    if floor is not None:
        won = {domain: _change(incumbent, floor, domains[domain]) for domain in judged if domain in gone}
        limits |= {domain: max(max_regression, gone_loss) for domain in won}
        spared = {domain for domain in won if won[domain] <= gone_loss}
    losing = [domain for domain in judged if judged[domain].mean < -max_regression and domain not in spared]
    worse = [domain for domain in losing if judged[domain].mean < -allowed]
    sunk = {} if floor is None else _sunk(candidate, floor, domains, judged, limits)
    n = len(deciding)
    if n < min_traces:
        found = ", ".join(sorted({score.stratum for score in candidate})) or "none"
        promote, reason = False, f"only {n} of {min_traces} {gain_stratum} traces (strata given: {found})"
    elif not gain.low > min_gain:
        promote, reason = False, f"gain {_percent(gain)} is not surely above {min_gain:.1%} on {n} traces"
    elif worse:
        losses = ", ".join(f"{domain} {_percent(judged[domain])}" for domain in worse)
        promote, reason = False, f"gain {_percent(gain)}, but more than {allowed:.1%} is lost on {losses}"
    elif sunk:
        losses = ", ".join(f"{domain} {change:+.1%} (limit {limits[domain]:.1%})" for domain, change in sunk.items())
        promote, reason = False, f"gain {_percent(gain)}, but too far below the floor: {losses}"
    else:
        promote, reason = True, f"gain {_percent(gain)} on {n} traces; no domain loses more than {allowed:.1%}"
        lost = [d for d in sorted(spared) if judged[d].mean < -allowed]
        if lost:
            reason += f" but {', '.join(f'{d} {_percent(judged[d])}' for d in lost)}, not asked any more"
    silent = ", ".join(f"{domain} ({len(domains[domain])})" for domain in by_domain if domain not in judged)
    if silent:
        reason += f"; too few traces to veto: {silent}"
    return Verdict(promote, reason, gain, by_domain, n, losers=tuple(dict.fromkeys([*losing, *sunk])))


def _sunk(
    candidate: Sequence[Score],
    floor: Sequence[Score],
    domains: Mapping[str, Sequence[int]],
    judged: Mapping[str, Interval],
    limits: Mapping[str, float],
) -> dict[str, float]:
    """Domains that stay too far below the floor, with their relative distance to it; those that recover are left out."""
    found = {}
    for domain, change in judged.items():
        distance = _change(candidate, floor, domains[domain])
        if distance < -limits[domain] and not change.mean > 0.0:
            found[domain] = distance
    return found


def _change(scores: Sequence[Score], other: Sequence[Score], rows: Sequence[int]) -> float:
    """Relative gain of `scores` over `other` on the traces `rows`."""
    counts = [(scores[r].emitted, scores[r].rounds, other[r].emitted, other[r].rounds) for r in rows]
    return float(_relative_gain(np.array(counts, dtype=np.float64).sum(0)))


class LiveWatch:
    """Sequential test of live acceptance after a promotion: is the new draft worse than the old one was?

    The tested mean is m = baseline * (1 - max_drop). Two test martingales bet on each request's acceptance x, a number
    within [0, 1]: one against "the mean is at least m", W = average over bets b of prod(1 + b (m - x)), one against "it
    is at most m", with x - m (Waudby-Smith and Ramdas 2024, "Estimating means of bounded random variables by betting";
    fixed bets, averaged, so nothing is tuned on the data). As long as the hypothesis holds at every request given the
    past, E[W] <= 1 and by Ville's inequality W ever reaches 1/alpha with probability at most alpha. So:

    - "worse" is a false alarm with probability at most `false_alarm`, over the watch's whole unlimited life and however
      often it is looked at, whatever the distribution of x: independence and equal variances are not needed.
    - "confirmed" is false with probability at most `false_confirm` in the same sense.

    Both are final. Near m neither may ever come: the watch then just stays "watching". A baseline is an average over
    past traffic: where the mix of domains moves, pass each request's own `baseline` (that of its domain) to `update`,
    or a change of traffic looks like a change of draft. `max_drop` also has to cover the baseline's own error.
    """

    def __init__(
        self, baseline: float, *, max_drop: float = 0.1, false_alarm: float = 0.01, false_confirm: float = 0.05
    ) -> None:
        """A watch that has seen nothing.

        Args:
          baseline: mean acceptance share per request (accepted / proposed) before the promotion, within [0, 1].
          max_drop: relative loss that is still accepted, within [0, 1).
          false_alarm: bound on the probability of ever answering "worse" though the mean is at least m.
          false_confirm: bound on the probability of ever answering "confirmed" though the mean is at most m.

        Raises: ValueError: an argument out of range.
        """
        _require_share("baseline", baseline)
        if not 0.0 <= max_drop < 1.0:
            raise ValueError(f"max_drop ({max_drop}) must lie within [0, 1)")
        for name, value in (("false_alarm", false_alarm), ("false_confirm", false_confirm)):
            if not 0.0 < value < 1.0:
                raise ValueError(f"{name} ({value}) must be strictly between 0 and 1")
        self._baseline = baseline
        self._max_drop = max_drop
        self._thresholds = (math.log(1.0 / false_alarm), math.log(1.0 / false_confirm))
        # Logarithm of each bet's wealth so far, nats.
        self._worse = [0.0] * len(_BETS)
        self._fine = [0.0] * len(_BETS)
        self._state: WatchState = "watching"
        self._seen = 0

    @property
    def state(self) -> WatchState:
        """The answer of the last `update`."""
        return self._state

    @property
    def seen(self) -> int:
        """Requests the answer rests on; those after the final answer are not counted."""
        return self._seen

    def update(self, value: float, baseline: float | None = None) -> WatchState:
        """Add one request's acceptance share; once "worse" or "confirmed", always that.

        Args:
          value: accepted / proposed of the request, within [0, 1].
          baseline: mean acceptance expected of such a request, fixed before it was served; default: the watch's.

        Raises: ValueError: value or baseline outside [0, 1] or NaN; the state is unchanged.
        """
        _require_share("value", value)
        expected = self._baseline if baseline is None else baseline
        _require_share("baseline", expected)
        if self._state != "watching":
            return self._state
        self._seen += 1
        mean = expected * (1.0 - self._max_drop)
        # Each side's mean is moved, where it must be, so that its answer becomes harder to reach: the bounds hold.
        below = min(mean, 1.0 - _MEAN_MARGIN)
        above = max(mean, _MEAN_MARGIN)
        if _bet(self._worse, (below - value) / (1.0 - below)) >= self._thresholds[0]:
            self._state = "worse"
        if _bet(self._fine, (value - above) / above) >= self._thresholds[1] and self._state == "watching":
            self._state = "confirmed"
        return self._state


def _relative_gain(sums: FloatArray) -> FloatArray:
    """Sums [..., 4] of candidate emitted, candidate rounds, incumbent emitted, incumbent rounds -> gain [...]."""
    gain: FloatArray = (sums[..., 0] / sums[..., 1]) / (sums[..., 2] / sums[..., 3]) - 1.0
    return gain


def _bet(log_wealth: list[float], outcome: float) -> float:
    """Place every bet on an outcome, at least -1; update the wealths in place and give the log of their average."""
    for index, bet in enumerate(_BETS):
        log_wealth[index] += math.log1p(bet * outcome)
    top = max(log_wealth)
    return top + math.log(sum(math.exp(value - top) for value in log_wealth) / len(log_wealth))


def _percent(interval: Interval) -> str:
    return f"{interval.mean:+.1%} ({interval.low:+.1%} to {interval.high:+.1%})"


def _require_share(name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} ({value}) must be an acceptance share within [0, 1]")


def require_pairs(candidate: Sequence[Score], incumbent: Sequence[Score]) -> None:
    """Raises ValueError unless both are scores of the same traces in the same order."""
    if len(candidate) != len(incumbent):
        raise ValueError(
            f"candidate ({len(candidate)} scores) and incumbent ({len(incumbent)}) must score the same traces"
        )
    for row, (c, i) in enumerate(zip(candidate, incumbent, strict=True)):
        if (c.domain, c.stratum) != (i.domain, i.stratum):
            raise ValueError(
                f"score {row} must be of one trace: candidate of ({c.domain}, {c.stratum}), "
                f"incumbent of ({i.domain}, {i.stratum})"
            )
