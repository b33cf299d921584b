"""New drafts on their way through the servers: the canary first, the others when its traffic has confirmed them.

Each server has a publisher of its own. What it is to draft with is asked anew at every look, so a server that was away, or
failed to take a version, gets what is due by then.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from adaptd.sidecar.fleet import Fleet, Server
from policies.canary import Canary


class Staged:
    """What one server is to draft with, in the place of a store's CURRENT."""

    def __init__(self, wanted: Callable[[], int]) -> None:
        self._wanted = wanted

    def current(self) -> int | None:
        """The version; None is day 0."""
        return self._wanted() or None


class Rollout:
    """Decides for each server of a fleet.

    Args:
      newest: the version that was published last, 0 for none.
      settled: the newest one that needs no watching any more.
    """

    def __init__(self, fleet: Fleet, newest: Callable[[], int], settled: Callable[[], int]) -> None:
        self._fleet, self._newest, self._settled = fleet, newest, settled
        self._canary = Canary([server.name for server in fleet.servers])

    @property
    def canary(self) -> str | None:
        """Who takes versions first; None for one server alone, or before one is up that takes them."""
        return self._canary.canary if self._fleet.several else None

    def stage(self, server: Server) -> Staged:
        """What this server follows."""
        return Staged(partial(self._wanted, server))

    def _wanted(self, server: Server) -> int:
        if not self._fleet.several:
            return self._newest()
        able = [each.name for each in self._fleet.ready if each.takes_drafts()]
        return self._canary.wanted(able, self._newest(), self._settled())[server.name]
