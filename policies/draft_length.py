"""How many tokens the draft proposes in the next round: what gives most tokens a second, and none where none pays.

The expected length of a round of k proposals follows from acceptance by depth (Leviathan et al. 2023, section 3.1, there
with one acceptance rate for all depths), its price from `RoundCosts`. Rows that are decoded together share a round, and so
a k: the one with the highest goodput, the sum of their expected lengths over the price of the round (Liu et al. 2024,
"Optimizing speculative decoding for serving large language models using goodput": SmartSpec, later TurboSpec).

Acceptance is counted for each class of requests (their domain), at each depth, over the rounds that say something about
it: those that drafted as deep and accepted everything before. Counts fade: `WINDOW` rounds of a class, but what was seen
last is kept where little is drafted. Where a class has no counts, the other classes' acceptance stands in: at the first
depth as it is, further down as the change from one depth to the next. A new draft version leaves `CARRIED` rounds of
what its predecessor did.

Nothing is known where nothing is drafted. One round in 1 / `SHARE`, in runs of `RUN`, is therefore played at another
length, by turns one deeper than the chosen one and the one timed longest ago; without a draft, the one that would be
best. After a new version `FRESH` rounds are. All of it is counted, not drawn: a choice never uses up a random number.

A k is kept until another promises `MARGIN` more, so that two equally good ones do not alternate.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from policies.economics import mal_at
from policies.round_costs import RoundCosts

#: Rounds of a class that its counts go back to.
WINDOW = 512
#: Judged proposals of a depth that do not fade, and rounds of a class before it may go without a draft.
KEPT = 16
#: Judged proposals of a depth that a new draft version inherits.
CARRIED = 8
#: Acceptance where nothing is known of any class, and how many judged proposals the prior counts for.
_UNKNOWN, _PRIOR = 0.7, 2.0
#: Relative gain in goodput below which nothing is changed.
MARGIN = 0.01
#: Share of the rounds at another length, how many in a row, and how many more after a new draft version.
SHARE, RUN, FRESH = 1 / 64, 4, 16
#: Classes told apart; any further one is counted as `other`.
_MAX_CLASSES = 64


class _Acceptance:
    """Faded counts by depth."""

    def __init__(self, k_max: int) -> None:
        self.reached, self.accepted = [0.0] * k_max, [0.0] * k_max

    def add(self, n_accepted: int, n_reached: int) -> None:
        for depth in range(n_reached):
            self.reached[depth] += 1.0
            self.accepted[depth] += depth < n_accepted

    def fade(self, factor: float, least: float) -> None:
        """Counts shrink by `factor`, no depth's to below `least`."""
        for depth, reached in enumerate(self.reached):
            if reached > least:
                held = max(factor, least / reached)
                self.reached[depth] *= held
                self.accepted[depth] *= held

    def rate(self, depth: int, prior: float) -> float:
        return (self.accepted[depth] + _PRIOR * prior) / (self.reached[depth] + _PRIOR)


@dataclass(slots=True)
class _Class:
    acceptance: _Acceptance
    rounds: int = 0
    """Rounds with a draft, up to `KEPT`."""
    credit: float = 0.0
    """Trial rounds that it may ask for."""
    chosen: int = 0


class DraftLength:
    """Chooses k for each round. One owner; `chosen` alone may be read by another thread.

    `choose` and `observe` take turns; a round whose length somebody else fixed is only observed.

    Args:
      k_max: longest draft.
    Raises: ValueError: k_max below 1.
    """

    def __init__(self, k_max: int) -> None:
        self.costs = RoundCosts(k_max)
        self.k_max = k_max
        self._all = _Acceptance(k_max)
        self._classes: dict[str, _Class] = {}
        self._last = k_max
        self._version: int | None = None
        self._trial: int | None = None
        self._run = 0
        self._turn = 0
        self.trials = 0
        """Rounds played at another length than the chosen one, without the first timings of each size of batch."""

    @property
    def chosen(self) -> dict[str, int]:
        """Length of the last ordinary round of each class."""
        return {name: found.chosen for name, found in list(self._classes.items())}

    def choose(self, classes: Sequence[str], version: int) -> int:
        """The length of the next round, 0 to k_max.

        Args:
          classes: of the rows that are decoded together, at least one.
          version: of the draft that will propose.
        """
        if version != self._version:
            self._adopt(version)
        batch, rows = len(classes), Counter(map(self._name, classes))
        self._trial = self.costs.due(batch)
        if self._trial is not None:
            return self._trial
        goodput = self._goodput(rows, batch)
        # One whose class is hardly known drafts at least one token, or nothing more would be learned.
        new = any(self._classes[name].rounds < KEPT for name in rows)
        best = max(range(int(new), self.k_max + 1), key=goodput.__getitem__)
        if self._last >= int(new) and goodput[best] <= (1.0 + MARGIN) * goodput[self._last]:
            best = self._last
        self._last = best
        for name in rows:
            self._classes[name].chosen = best
        self._trial = self._another(rows, best, goodput, batch)
        return best if self._trial is None else self._trial

    def observe(self, classes: Sequence[str], k: int, judged: Sequence[tuple[int, int]], seconds: float) -> None:
        """What became of a round.

        Args:
          classes: of its rows, as `choose` got them.
          k: its length.
          judged: of each row, how many proposals were accepted, and how many were judged.
          seconds: that it took.
        """
        self.costs.put(len(classes), k, seconds, trial=self._trial is not None)
        self._trial = None
        for name, rows in Counter(map(self._name, classes)).items():
            found = self._classes[name]
            found.acceptance.fade((1.0 - 1.0 / WINDOW) ** rows, KEPT)
            found.rounds = min(KEPT, found.rounds + (k > 0))
        self._all.fade((1.0 - 1.0 / WINDOW) ** len(classes), KEPT)
        for label, (n_accepted, n_reached) in zip(classes, judged, strict=True):
            for counts in (self._classes[self._name(label)].acceptance, self._all):
                counts.add(n_accepted, n_reached)

    def accept_at(self, label: str) -> list[float]:
        """[k_max] estimated acceptance of a class at each depth, given that it was reached."""
        counts = self._classes[self._name(label)].acceptance
        rates: list[float] = []
        before = _UNKNOWN
        for depth in range(self.k_max):
            common = self._all.rate(depth, before)
            prior = min(1.0, rates[-1] * common / before) if rates and before > 0.0 else common
            rates.append(counts.rate(depth, prior))
            before = common
        return rates

    def further(self, label: str) -> list[float]:
        """[k_max + 1] expected number of proposals accepted behind the first k, where these k all were."""
        rates, left = self.accept_at(label), [0.0]
        for rate in reversed(rates):
            left.append(rate * (1.0 + left[-1]))
        return left[::-1]

    def _goodput(self, rows: Counter[str], batch: int) -> list[float]:
        rates = {name: self.accept_at(name) for name in rows}
        return [
            sum(n * mal_at(rates[name], k) for name, n in rows.items()) / price
            for k, price in enumerate(self.costs.ratios(batch))
        ]

    def _another(self, rows: Counter[str], chosen: int, goodput: Sequence[float], batch: int) -> int | None:
        """The length of a trial, if this round is one."""
        present = [self._classes[name] for name in rows]
        for found in present:
            found.credit = min(found.credit + SHARE, float(RUN + FRESH))
        if self._run == 0:
            if max(found.credit for found in present) < RUN:
                return None
            self._run, self._turn = RUN, self._turn + 1
        self._run -= 1
        self.trials += 1
        for found in present:
            found.credit -= 1.0
        if chosen == 0 and self._turn % 2:
            return max(range(1, self.k_max + 1), key=goodput.__getitem__)
        if chosen < self.k_max and self._turn % 2:
            return chosen + 1
        return self.costs.stalest(batch, chosen)

    def _adopt(self, version: int) -> None:
        """Another draft proposes from now on."""
        if self._version is not None:
            self._all.fade(0.0, CARRIED)
            for found in self._classes.values():
                found.acceptance.fade(0.0, CARRIED)
                found.credit = float(FRESH)
        self._version = version

    def _name(self, label: str) -> str:
        name = label if label in self._classes or len(self._classes) < _MAX_CLASSES else "other"
        if name not in self._classes:
            self._classes[name] = _Class(_Acceptance(self.k_max))
        return name
