"""What is before and what is after: two parts of a period that a report compares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from adaptd.report.columns import summary
from adaptd.report.monitor import ALL
from buffers.series import Counts, Window

Baseline = Literal["first", "day0"]
#: Share of the rounds that each part has, comparing the first with the last.
_SHARE = 1 / 3


class Split(NamedTuple):
    """Before is what was served before `before`, after what was served from `after` on, in unix seconds."""

    before: float
    after: float

    def side(self, at: float) -> int:
        """0 before, 1 after, -1 between the two."""
        return 0 if at < self.before else 1 if at >= self.after else -1


def split(
    window: Window, total: Counts, events: Sequence[Mapping[str, Any]], baseline: Baseline
) -> tuple[Split | None, str]:
    """The two parts, or None and why there are none.

    Args:
      total: [B, W] sums of all domains.
      events: everything remembered, oldest first, also from before the window.
      baseline: `first`: the first third of the rounds against the last; `day0`: what was served before the first
        promotion against what the newest version serves.
    """
    return _by_rounds(window, total) if baseline == "first" else _by_version(window, total, events)


def _by_rounds(window: Window, total: Counts) -> tuple[Split | None, str]:
    rounds = total[:, 2]
    share = np.cumsum(rounds) / max(1, rounds.sum())
    busy = np.flatnonzero(rounds)
    if not len(busy):
        return None, "the period holds no traffic"
    if len(busy) < 2:
        return None, "all traffic of the period lies in one bucket of the time series: ask again later"
    at = window.at
    last = max(int(np.searchsorted(share, _SHARE)), int(busy[0]))
    first = min(int(np.searchsorted(share, 1 - _SHARE, side="right")), int(busy[-1]))
    if last >= first:
        last, first = (last - 1, first) if last > busy[0] else (last, last + 1)
    return Split(at[last] + window.step_s, at[first]), ""


def _by_version(window: Window, total: Counts, events: Sequence[Mapping[str, Any]]) -> tuple[Split | None, str]:
    swaps = [e for e in events if e["kind"] in ("promoted", "rolled_back") and "version" in e]
    if not swaps:
        return None, "nothing was promoted yet: day 0 is what serves now"
    if swaps[0]["version"] != 1:
        return None, "when day 0 served is not remembered; take --baseline first"
    # A bucket in which both served belongs to neither.
    found = Split(swaps[0]["at"] - window.step_s + 1, swaps[-1]["at"])
    if not total[_within(window, found) == 0, 2].any():
        return None, "the period holds no traffic of day 0: take a longer one, or --baseline first"
    if not total[_within(window, found) == 1, 2].any():
        return None, f"version {swaps[-1]['version']} has not served for a whole bucket yet: ask again later"
    return found, ""


def _within(window: Window, parts: Split) -> Counts:
    return np.array([parts.side(at) for at in window.at], np.int64)


def compared(
    window: Window, by_domain: Mapping[str, Counts], parts: Split, groups: tuple[str, ...]
) -> dict[str, dict[str, Any]]:
    """Metrics of both parts, `before` and `after`, by domain; domains without any rounds in one are left out of it."""
    side = _within(window, parts)
    found: dict[str, dict[str, Any]] = {}
    for i, name in enumerate(("before", "after")):
        rows = {domain: table[side == i].sum(0) for domain, table in by_domain.items()}
        found[name] = {d: summary(row, groups) for d, row in rows.items() if row[2] or d == ALL}
    return found
