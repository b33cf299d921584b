"""Trends of a period as JSON values: what `GET /adaptd/status?since=` adds to the status."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from adaptd.report.columns import GROUPS, WIDTH, ratio, summary, widened
from adaptd.report.monitor import ALL
from buffers.series import Counts, Window

Groups = tuple[str, ...]


def tables(window: Window, groups_since: float) -> dict[str, Counts]:
    """[B, WIDTH] by domain, and of ALL together; token groups from before their rules last changed are left out."""
    found = {name: widened(rows) for name, rows in sorted(window.counts.items())}
    for rows in found.values():
        rows[: max(0, int(np.ceil((groups_since - window.first) / window.step_s))), GROUPS] = 0
    total = sum(found.values(), np.zeros((len(window.at), WIDTH), np.int64))
    return {**found, ALL: total}


def trends(
    since: str,
    start: float,
    until: float,
    window: Window,
    by_domain: Mapping[str, Counts],
    events: Sequence[Mapping[str, Any]],
    groups: Groups,
) -> dict[str, Any]:
    """The JSON values.

    Args:
      since: what was asked for; `start` and `until` in unix seconds.
      by_domain: as `tables` gives them.
    """
    return {
        "since": since,
        "from": max(start, window.first),
        "to": until,
        "step_s": window.step_s,
        "at": window.at,
        "domains": {name: _lines(rows) for name, rows in by_domain.items()},
        "summary": {name: summary(rows.sum(0), groups) for name, rows in by_domain.items()},
        "groups": list(groups),
        "versions": [
            {"at": event["at"], "version": event["version"], "kind": event["kind"]}
            for event in events
            if event["kind"] in ("promoted", "rolled_back") and "version" in event
        ],
        "events": [dict(event) for event in events],
    }


def _lines(rows: Counts) -> dict[str, list[Any]]:
    """Of each bucket; a ratio is None where nothing was counted."""
    return {
        "requests": rows[:, 0].tolist(),
        "tokens": rows[:, 1].tolist(),
        "mal": [ratio(emitted, rounds) for emitted, rounds in rows[:, 1:3]],
        "token_acceptance": [ratio(accepted, proposed) for proposed, accepted in rows[:, 3:5]],
    }
