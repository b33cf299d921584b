"""Live acceptance after promotions that are not confirmed yet: against what served before, and against what was promised.

Three sequential tests (`policies.gate.LiveWatch`) on the acceptance share (accepted / proposed) of each request, each of
its own domain's window before:

    chain    everything since the first unconfirmed version, against the window before that version.
             worse -> all of it goes back to what served before the first. It never starts anew when another version
             follows, so versions that each lose a little are caught by their sum.
    step     the newest of several unconfirmed versions, against the window just before it.
             worse -> back to the version before it: what the others had gained since the first is not given away.
    promise  the newest version, against the window before it scaled by the lower end of the gate's gain.
             Tells whether the gate's promise is kept, and does nothing: an overestimated gain is still a gain.

Chain and step end at the latest when `max_requests` requests were served, compared or not: undecided, by whether the mean
is below.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from policies.gate import LiveWatch, WatchState

#: Requests of a domain that make a window; with fewer, its later requests are not compared.
MIN_WINDOW = 8
#: Compared requests below which a trial that has to end unsure finds nothing against a version.
_ENOUGH = 50

TrialState = Literal["watching", "worse", "fine"]
PromiseState = Literal["none", "open", "kept", "broken"]


class Window(NamedTuple):
    """Mean acceptance share per request of a domain before a promotion, and the standard error of that mean."""

    mean: float
    error: float

    @property
    def expected(self) -> float:
        """What is asked of later requests: one standard error less, for the window is a sample too."""
        return max(0.0, self.mean - self.error)


def window(shares: Sequence[float]) -> Window | None:
    """The window of these requests; None if they are fewer than `MIN_WINDOW`."""
    n = len(shares)
    if n < MIN_WINDOW:
        return None
    mean = sum(shares) / n
    variance = sum((share - mean) ** 2 for share in shares) / (n - 1)
    return Window(mean, math.sqrt(variance / n))


def promised_share(share: float, gain: float, k: int) -> float:
    """Acceptance share that a relative gain in MAL promises over `share`: MAL = 1 + k share. Cut to [0, 1]."""
    return min(1.0, max(0.0, ((1.0 + k * share) * (1.0 + gain) - 1.0) / k))


class Trial:
    """One `LiveWatch` with an end: after `max_requests` it is worse if the mean is below, else fine.

    Raises: ValueError: max_requests below 1; what `LiveWatch` raises.
    """

    def __init__(self, *, max_requests: int = 400, max_drop: float = 0.1, false_alarm: float = 0.01) -> None:
        if max_requests < 1:
            raise ValueError(f"max_requests ({max_requests}) must be at least 1")
        self._watch = LiveWatch(0.0, max_drop=max_drop, false_alarm=false_alarm)
        self.max_requests, self._max_drop = max_requests, max_drop
        self._shares = self._expected = 0.0
        self.state: TrialState = "watching"
        self.sure = False
        """Whether the test decided, not the end of the trial."""

    @property
    def seen(self) -> int:
        """Requests so far."""
        return self._watch.seen

    @property
    def share(self) -> float | None:
        """Mean acceptance share so far."""
        return self._shares / self.seen if self.seen else None

    @property
    def expected(self) -> float | None:
        """Mean of what was expected of the same requests."""
        return self._expected / self.seen if self.seen else None

    def update(self, share: float, expected: float) -> TrialState:
        """Add a request's share, and what is expected of such a request; final once it is not "watching".

        Raises: ValueError: share or expected outside [0, 1].
        """
        if self.state != "watching":
            return self.state
        found: WatchState = self._watch.update(share, expected)
        self._shares += share
        self._expected += expected
        if found != "watching":
            self.sure, self.state = True, "worse" if found == "worse" else "fine"
        elif self.seen >= self.max_requests:
            self.close()
        return self.state

    def close(self) -> TrialState:
        """End it now: worse if the mean of enough requests is below, else fine."""
        if self.state == "watching":
            enough = self.seen >= min(_ENOUGH, self.max_requests)
            below = self._shares < self._expected * (1.0 - self._max_drop)
            self.state = "worse" if enough and below else "fine"
        return self.state

    def describe(self) -> str:
        """The figures in words."""
        if not self.seen:
            return "no requests"
        return f"{self.share:.1%} accepted, {self.expected:.1%} expected, {self.seen} requests"


class Regression(NamedTuple):
    """A version, or several, to be taken back."""

    back_to: int
    """The version that served before them; 0: day 0."""
    refused: tuple[int, ...]
    reason: str


class Confirmed(NamedTuple):
    """This version and those before it are watched no more."""

    version: int
    reason: str


@dataclass(slots=True)
class _Step:
    """The newest version."""

    version: int
    before: int
    windows: Mapping[str, Window]
    trial: Trial
    gain: float | None = None
    promised: Mapping[str, float] = field(default_factory=dict)
    promise: LiveWatch | None = None
    served: int = 0

    def observe(self, domain: str, share: float) -> None:
        self.served += 1
        if domain in self.windows:
            self.trial.update(share, self.windows[domain].expected)

    def observe_promise(self, domain: str, share: float) -> None:
        if self.promise is not None and domain in self.promised and self.promise.seen < self.trial.max_requests:
            self.promise.update(share, self.promised[domain])


class ChainWatch:
    """The state machine over promotions; not safe for several threads.

    Args:
      max_requests: requests of unconfirmed versions after which a trial ends, decided or not.
      max_drop: relative loss against the window before that is taken for noise.
      false_alarm: bound on the probability that one trial's test refuses what is no worse than that.

    Raises: ValueError: an argument out of range.
    """

    def __init__(self, *, max_requests: int = 400, max_drop: float = 0.1, false_alarm: float = 0.01) -> None:
        self._max_requests, self._max_drop, self._false_alarm = max_requests, max_drop, false_alarm
        self._chain = self._trial()
        self._safe = 0
        self._windows: Mapping[str, Window] = {}
        self._members: list[int] = []
        self._step: _Step | None = None
        self._served = 0

    def _trial(self) -> Trial:
        return Trial(max_requests=self._max_requests, max_drop=self._max_drop, false_alarm=self._false_alarm)

    @property
    def unconfirmed(self) -> tuple[int, ...]:
        """Versions under watch, oldest first."""
        return tuple(self._members)

    @property
    def before(self) -> int | None:
        """What served before them; None if nothing is watched."""
        return self._safe if self._members else None

    def promoted(
        self, version: int, over: int, windows: Mapping[str, Window], *, gain: float | None = None, k: int = 1
    ) -> None:
        """A version was promoted.

        Args:
          over: the version that served until now.
          windows: by domain, of the traffic until now.
          gain: lower end of the gate's relative gain in MAL over `over`; None: nothing was promised.
          k: tokens that the engine proposes a round.
        """
        if self._members and self._members[-1] != over:
            self.forget()  # something else was put in between
        if not self._members:
            self._safe, self._windows, self._chain, self._served = over, dict(windows), self._trial(), 0
        self._members.append(version)
        step = self._step = _Step(version, over, dict(windows), self._trial())
        if gain is not None:
            step.gain, step.promise = gain, LiveWatch(0.0, max_drop=0.0, false_alarm=0.05)
            step.promised = {name: promised_share(found.mean, gain, k) for name, found in windows.items()}

    def observe(self, version: int, domain: str, share: float) -> Regression | Confirmed | None:
        """One finished request, by the version that served it; what follows from it, if anything.

        After a `Regression` nothing is watched until `taken_back` or the next promotion.

        Raises: ValueError: share outside [0, 1].
        """
        step = self._step
        if step is None:
            return None
        if version == step.version:
            step.observe_promise(domain, share)
        if version not in self._members:
            return None
        if version == step.version:
            step.observe(domain, share)
        if domain in self._windows:
            self._chain.update(share, self._windows[domain].expected)
        self._served += 1
        if self._served >= self._max_requests:
            self._chain.close()
        return self._decide(step)

    def _decide(self, step: _Step) -> Regression | Confirmed | None:
        chain, members = self._chain, self._members
        if chain.state == "worse":
            names = ", ".join(map(str, members))
            found = Regression(self._safe, tuple(members), f"live acceptance with version {names}: {chain.describe()}")
            self._members, self._step = [], None
            return found
        if step.trial.state == "worse":
            about = f"live acceptance with version {step.version}: {step.trial.describe()}"
            self._members, self._step = members[:-1], None
            return Regression(step.before, (step.version,), about)
        if chain.state == "watching":
            return None
        about = f"{'not worse' if chain.sure else 'not seen to be worse'} than before: {chain.describe()}"
        if len(members) == 1 or step.trial.state == "fine":
            self._members = []
            return Confirmed(step.version, about)
        # The newest has not shown enough of itself: it goes on alone, against what was before it.
        self._members, self._safe, self._windows, self._chain = [step.version], step.before, step.windows, step.trial
        self._served, step.windows, step.trial = step.served, {}, self._trial()
        return Confirmed(members[-2], about)

    def taken_back(self, version: int) -> None:
        """What a `Regression` named has gone; `version` serves, with the tensors of what served before it.

        Versions that are still unconfirmed go on under that number. Their trial starts again: it had requests of the
        refused one in it.
        """
        self._step = None
        if self._members:
            self._members.append(version)
            self._chain, self._served = self._trial(), 0
            self._step = _Step(version, self._safe, {}, self._trial())

    def forget(self) -> None:
        """Watch nothing: somebody decided otherwise."""
        self._members, self._step = [], None

    @property
    def promise(self) -> PromiseState:
        """What live traffic says so far of the gate's promise for the newest version; "none" if there is none."""
        if self._step is None or self._step.promise is None:
            return "none"
        known: dict[WatchState, PromiseState] = {"watching": "open", "worse": "broken", "confirmed": "kept"}
        return known[self._step.promise.state]

    def status(self) -> dict[str, Any]:
        """Plain JSON values; shares and counts are those of the chain."""
        chain, step, watching = self._chain, self._step, bool(self._members)
        return {
            "watching": list(self._members),
            "before": self.before,
            "requests": self._served if watching else 0,
            "max_requests": self._max_requests,
            "accepted": chain.share if watching else None,
            "expected": chain.expected if watching else None,
            "promised_gain": None if step is None else step.gain,
            "promise": self.promise,
        }

    def dump(self) -> dict[str, Any]:
        """What a restart must not forget, as plain JSON: which versions are unconfirmed, and against what."""
        return {"members": list(self._members), "safe": self._safe, "windows": dict(self._windows)}

    def resume(self, saved: Mapping[str, Any], current: int) -> None:
        """Go on where `dump` was made, with new trials; nothing is watched if `current` was not.

        Raises: KeyError, TypeError, ValueError: it is not what `dump` gave.
        """
        members = [int(member) for member in saved["members"]]
        if not members or members[-1] != current:
            return
        windows = {str(name): Window(*map(float, found)) for name, found in saved["windows"].items()}
        self._members, self._safe, self._windows = members, int(saved["safe"]), windows
        self._chain = self._trial()
        self._step = _Step(current, self._safe, {}, self._trial())
