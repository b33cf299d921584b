"""A new draft on several servers: one takes it first, the others follow once its traffic shows no harm.

The state machine decides; its owner carries the actions out and reports back.

    IDLE --offer--> TRYING --worse, or undecided and below--> IDLE   (roll back the one)
                      |
                      `--confirmed, or undecided and not below--> SPREADING --all installed--> IDLE

With one server the canary is that server, and there is nobody left to spread to. A version that was rolled back is
quarantined together with everything learned from it: see `Quarantine`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from policies.watch import Trial

Phase = Literal["idle", "trying", "spreading"]


class Action(NamedTuple):
    """One thing to do; report its end by `installed` or `failed`."""

    #: "install": bring `version` in. "roll_back": bring `version`, the one before, back.
    kind: Literal["install", "roll_back"]
    server: str
    version: int


class Quarantine:
    """Versions that may not be promoted again: those that live traffic refused, and what was learned from them.

    A version's parent is what its learner stood at. Tensors that are published again are known by the version that
    they were first (`restored` of a manifest), so that a new number does not clear them.
    """

    def __init__(self, reasons: Mapping[int, str] | None = None) -> None:
        """`reasons`: what was quarantined before, by version."""
        self._reasons: dict[int, str] = dict(reasons or {})

    @property
    def reasons(self) -> dict[int, str]:
        """Why, by version."""
        return dict(self._reasons)

    def add(self, version: int, reason: str) -> None:
        """Live traffic refused this version. Day 0 cannot be quarantined: there must be a way back.

        Raises: ValueError: version is below 1.
        """
        if version < 1:
            raise ValueError(f"version ({version}) must be at least 1: day 0 is the way back and always allowed")
        self._reasons.setdefault(version, reason)

    def refusal(self, version: int, parents: Mapping[int, int | None], restored: int | None = None) -> str:
        """Why this version may not be promoted, as a sentence; empty if it may.

        Args:
          parents: parent by version, as in the manifests; None or absent: day 0.
          restored: the version whose tensors these are, if they are published again.
        """
        at = next(self._refused(version, parents, restored), None)
        if at is None:
            return ""
        from_it = "" if at == version else f"it comes from version {at}, and "
        return f"version {version} is quarantined: {from_it}version {at} was rolled back ({self._reasons[at]})"

    def lift(self, version: int, parents: Mapping[int, int | None], restored: int | None = None) -> list[int]:
        """Let this version, and what it comes from, be promoted again; which were quarantined."""
        lifted = list(self._refused(version, parents, restored))
        for number in lifted:
            del self._reasons[number]
        return lifted

    def _refused(self, version: int, parents: Mapping[int, int | None], restored: int | None) -> Iterator[int]:
        """The quarantined ones on the way to day 0, nearest first."""
        at: int | None = version if restored is None else restored
        seen: set[int] = set()
        while at and at not in seen:
            if at in self._reasons:
                yield at
            seen.add(at)
            at = parents.get(at)


@dataclass(slots=True)
class _Trial:
    version: int
    server: str
    trial: Trial
    installed: bool = False


class Canary:
    """Which server gets which version next. Not safe for several threads.

    Args:
      servers: names, in the order in which they try new versions.
      max_requests: requests of the canary after which its trial ends, decided or not.
      max_drop: relative loss of acceptance against the baseline that is taken for noise.
      false_alarm: bound on the probability of rolling back a version that is no worse than that.

    Raises: ValueError: no servers, the same name twice, or max_requests below 1.
    """

    def __init__(
        self,
        servers: Sequence[str],
        *,
        max_requests: int = 400,
        max_drop: float = 0.1,
        false_alarm: float = 0.01,
        version: int = 0,
    ) -> None:
        if not servers or len(set(servers)) != len(servers):
            raise ValueError(f"servers ({', '.join(servers) or 'none'}) must be at least one name, each once")
        if max_requests < 1:
            raise ValueError(f"max_requests ({max_requests}) must be at least 1")
        self._max_requests, self._max_drop, self._false_alarm = max_requests, max_drop, false_alarm
        self._at = dict.fromkeys(servers, version)
        self._accepted = version
        self._waiting: tuple[int, float, Mapping[int, int | None]] | None = None
        self._trial: _Trial | None = None
        self._spreading: list[str] = []
        self.quarantine = Quarantine()
        #: Why the last trial ended as it did.
        self.verdict = ""

    @property
    def phase(self) -> Phase:
        """Where the machine stands."""
        if self._trial is not None:
            return "trying"
        return "spreading" if self._spreading else "idle"

    @property
    def versions(self) -> dict[str, int]:
        """What each server drafts with, as reported."""
        return dict(self._at)

    def offer(self, version: int, baseline: float, parents: Mapping[int, int | None]) -> list[Action]:
        """A new version passed the gate; the newest one waits while another is tried or spread.

        A version that is quarantined, or comes from one, is refused, now or when its turn comes; `verdict` then says why.

        Args:
          baseline: mean acceptance share per request before it, within [0, 1].
          parents: as for `Quarantine.refusal`.
        """
        if self.phase != "idle":
            self._waiting = (version, baseline, parents)
            return []
        if refusal := self.quarantine.refusal(version, parents):
            self.verdict = refusal
            return []
        server = next(iter(self._at))
        limits = Trial(max_requests=self._max_requests, max_drop=self._max_drop, false_alarm=self._false_alarm)
        self._trial = _Trial(version, server, limits)
        return [Action("install", server, version)]

    def installed(self, server: str, version: int) -> list[Action]:
        """A server drafts with this version now."""
        self._at[server] = version
        if self._trial is not None and (server, version) == (self._trial.server, self._trial.version):
            self._trial.installed = True
        if server in self._spreading and version == self._accepted:
            self._spreading.remove(server)
        return self._next()

    def failed(self, server: str, version: int) -> list[Action]:
        """A version could not be brought into a server, which keeps what it had.

        The canary's failure ends the trial; another server is left behind and gets the next version.
        """
        if self._trial is not None and (server, version) == (self._trial.server, self._trial.version):
            self.verdict = f"version {version} could not be installed on {server}"
            self._trial = None
        if server in self._spreading:
            self._spreading.remove(server)
        return self._next()

    def observe(self, server: str, share: float, baseline: float) -> list[Action]:
        """One finished request's acceptance share, and what was expected of such a request before the version.

        Raises: ValueError: share or baseline outside [0, 1].
        """
        trial = self._trial
        if trial is None or not trial.installed or server != trial.server:
            return []
        state = trial.trial.update(share, baseline)
        if state == "watching":
            return []
        if state == "worse":
            return self._roll_back(trial, trial.trial.describe())
        found = "confirmed" if trial.trial.sure else "not worse"
        self.verdict = f"version {trial.version} is {found} after {trial.trial.seen}"
        self._accepted, self._trial = trial.version, None
        self._spreading = [name for name in self._at if name != trial.server]
        return [Action("install", name, self._accepted) for name in self._spreading] or self._next()

    def _roll_back(self, trial: _Trial, found: str) -> list[Action]:
        self.verdict = f"version {trial.version} was rolled back on {trial.server}: {found}"
        if trial.version > 0:
            self.quarantine.add(trial.version, found)
        self._trial = None
        return [Action("roll_back", trial.server, self._accepted), *self._next()]

    def _next(self) -> list[Action]:
        """Try what waited."""
        if self.phase != "idle" or self._waiting is None:
            return []
        waiting, self._waiting = self._waiting, None
        return self.offer(*waiting)
