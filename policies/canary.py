"""A new draft on several servers: one takes it first, the others follow once its traffic shows no harm.

Which versions are confirmed is what `policies.watch` finds out: only the canary serves unconfirmed ones, so its requests
alone are in the test. What was rolled back is quarantined together with everything learned from it: see `Quarantine`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence


class Canary:
    """Which server is to draft with which version. Not safe for several threads.

    The first server that can take versions is the canary, and stays it as long as it can. With one server the canary is
    that server.

    Args:
      servers: names, in the order in which they become the canary.

    Raises: ValueError: no servers, or the same name twice.
    """

    def __init__(self, servers: Sequence[str]) -> None:
        if not servers or len(set(servers)) != len(servers):
            raise ValueError(f"servers ({', '.join(servers) or 'none'}) must be at least one name, each once")
        self._servers = tuple(servers)
        self.canary: str | None = None
        """Who takes new versions; None before the first `wanted` with a server that can."""

    def wanted(self, able: Collection[str], newest: int, settled: int) -> dict[str, int]:
        """The version of each server.

        Args:
          able: servers that are up and take versions; another one becomes the canary when it is not among them.
          newest: the version that was published last.
          settled: the newest confirmed one; the same as `newest` if there is nothing to find out.
        """
        if self.canary not in able:
            self.canary = next((name for name in self._servers if name in able), self.canary)
        return {name: newest if name == self.canary else settled for name in self._servers}


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
