"""What a replay found, from the sums that it kept: the result in the form of design section 4 (`replay`)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from adaptd.ingest.spool import Spool
from buffers.trace import Trace
from policies.acceptance import Profile
from policies.economics import Costs, expected_speedup, mal_at, recommended_depth
from policies.forecast import mal_interval
from policies.gate import Score, paired_bootstrap

#: Blocks that the records of a domain are summed in; bins of time, at most, and the records that are worth one.
BLOCKS, BINS, BIN_RECORDS = 512, 24, 20
Floats = npt.NDArray[np.float64]


def measured(traces: Sequence[Trace], before: Sequence[Profile], after: Sequence[Profile], seed: int) -> dict[str, Any]:
    """MAL before and after on the held-out traces, with intervals, overall and by domain."""
    found = _pair(before, after, seed)
    by_domain: dict[str, Any] = {}
    for domain in sorted({t.domain for t in traces}):
        rows = [i for i, t in enumerate(traces) if t.domain == domain]
        by_domain[domain] = _pair([before[i] for i in rows], [after[i] for i in rows], seed)
    return found | {"by_domain": by_domain}


def _pair(before: Sequence[Profile], after: Sequence[Profile], seed: int) -> dict[str, Any]:
    gain = None
    if before:
        gain = paired_bootstrap(_scores(after), _scores(before), np.random.default_rng(seed)).as_dict()
    return {
        "records": len(before),
        "mal_before": interval(before, seed),
        "mal_after": interval(after, seed),
        "gain": gain,
    }


def _scores(found: Sequence[Profile]) -> list[Score]:
    return [Score("", "", p.emitted, p.rounds) for p in found]


def interval(found: Sequence[Profile], seed: int) -> dict[str, float | None]:
    """MAL of these traces."""
    emitted, rounds = [p.emitted for p in found], [p.rounds for p in found]
    return mal_interval(emitted, rounds, np.random.default_rng(seed)).as_dict()


def prequential(spool: Spool, seed: int) -> dict[str, Any]:
    """MAL of every learned record *before* it was learned from, by domain and by time."""
    rows = spool.outcomes(BLOCKS, max(1, min(BINS, spool.count() // BIN_RECORDS)))
    domains: defaultdict[str, list[Any]] = defaultdict(list)
    bins: defaultdict[int, list[Any]] = defaultdict(list)
    for row in rows:
        domains[row[0]].append(row)
        bins[row[2]].append(row)
    by_time = []
    for index in sorted(bins):
        until = max(row[7] for row in bins[index] if row[7] is not None)
        by_time.append(_sums(bins[index], seed) | {"until": until if math.isfinite(until) and until > 0 else None})
    return _sums(rows, seed) | {
        "by_domain": {name: _sums(found, seed) for name, found in sorted(domains.items())},
        "by_time": by_time,
    }


def _sums(rows: Sequence[Any], seed: int) -> dict[str, Any]:
    blocks: dict[tuple[str, int], Floats] = {}
    for domain, block, _, emitted, before, after, records, _ in rows:
        key = (domain, block)
        blocks[key] = blocks.get(key, np.zeros(4)) + np.array([emitted, before, after, records])
    sums = np.array(list(blocks.values())) if blocks else np.zeros((0, 4))
    return {
        "records": int(sums[:, 3].sum()),
        "mal_before": mal_interval(sums[:, 0], sums[:, 1], np.random.default_rng(seed)).as_dict(),
        "mal_during": mal_interval(sums[:, 0], sums[:, 2], np.random.default_rng(seed)).as_dict(),
    }


def recommendation(after: Sequence[Profile], costs: dict[int, Costs], k: int) -> dict[str, Any]:
    """The k that pays best with this draft at the measured costs, and what the configured one gives."""
    reached = np.sum([p.reached for p in after], axis=0)
    accepted = np.sum([p.accepted_at for p in after], axis=0)
    accept_at = [float(a / r) if r > 0 else 0.0 for a, r in zip(accepted, reached, strict=True)]
    best, speedup = recommended_depth(accept_at, costs)
    return {
        "recommended_k": best,
        "speedup": {
            "recommended": speedup,
            "configured": expected_speedup(mal_at(accept_at, k), k, costs[k]),
            "by_k": {
                str(depth): expected_speedup(mal_at(accept_at, depth), depth, price) for depth, price in costs.items()
            },
        },
        "costs": {str(depth): {"draft": price.draft, "verify": price.verify} for depth, price in costs.items()},
        "acceptance_by_depth": accept_at,
    }
