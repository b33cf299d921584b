"""Rejections by token and by token group, before against after, from the traces that are still in the replay buffer.

The pairs of the test are tokens: one that was judged often enough on both sides, in the same domain, is its own control,
so that a change of what is asked does not pass for a change of the draft (paper 1 normalises by group for that).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from adaptd.report.columns import ratio
from adaptd.report.token_groups import TokenGroups
from buffers.trace import NO_TOKEN, Source, Trace

FloatArray = NDArray[np.float64]

#: Times that a token must have been judged on either side to be a pair.
MIN_JUDGED = 3
#: Pairs below which nothing is tested.
MIN_PAIRS = 6
#: Tokens listed.
_TOP = 20


class Rejections:
    """Collects traces, then compares.

    Args:
      side: time of a trace to 0 (before), 1 (after) or -1.
    """

    def __init__(self, side: Callable[[float], int]) -> None:
        self._side = side
        self.traces = [0, 0, 0]
        """Traces before, after, and in between."""
        # (domain, token) -> judged before, rejected before, judged after, rejected after, judged, rejected
        self._tokens: defaultdict[tuple[str, int], NDArray[np.int64]] = defaultdict(lambda: np.zeros(6, np.int64))
        self._proposed: Counter[int] = Counter()
        self._instead: defaultdict[int, Counter[int]] = defaultdict(Counter)

    def add(self, trace: Trace) -> None:
        """Count the judged positions of a trace: the token is the one that the target emitted there."""
        side = self._side(trace.created_at)
        self.traces[side if side >= 0 else 2] += 1
        judged = np.isin(trace.source, (Source.ACCEPTED, Source.CORRECTION))
        rejected = trace.source == Source.CORRECTION
        tokens, inverse = np.unique(trace.response[judged], return_inverse=True)
        n = np.bincount(inverse, minlength=len(tokens))
        bad = np.bincount(inverse, rejected[judged], minlength=len(tokens)).astype(np.int64)
        for token, a, b in zip(tokens.tolist(), n.tolist(), bad.tolist(), strict=True):
            row = self._tokens[trace.domain or "default", token]
            row[4:] += a, b
            if side >= 0:
                row[2 * side : 2 * side + 2] += a, b
        for wanted, offered in zip(trace.response[rejected].tolist(), trace.rejected[rejected].tolist(), strict=True):
            if offered != NO_TOKEN:
                self._proposed[offered] += 1
                self._instead[offered][wanted] += 1

    def values(self, groups: TokenGroups, texts: Callable[[Sequence[int]], Sequence[str]]) -> dict[str, Any]:
        """JSON values: sums and test by group and for all, and the tokens that were rejected most often."""
        keys = list(self._tokens)
        rows = np.array([self._tokens[key] for key in keys], np.int64).reshape(-1, 6)
        where = groups.of(np.array([token for _, token in keys], np.int64)) if keys else np.zeros(0, np.int64)
        by_group = {name: compared(rows[where == i]) for i, name in enumerate(groups.names)}
        for name, p in holm({name: row["test"]["p"] for name, row in by_group.items()}).items():
            by_group[name]["test"]["p_holm"] = p
        return {
            "traces": dict(zip(("before", "after", "between"), self.traces, strict=True)),
            "by_group": by_group,
            "all": compared(rows),
            "top_wanted": self._wanted(keys, rows, groups, texts),
            "top_proposed": self._offered(groups, texts),
        }

    def _wanted(
        self, keys: list[tuple[str, int]], rows: NDArray[np.int64], groups: TokenGroups, texts: Any
    ) -> list[dict[str, Any]]:
        totals: defaultdict[int, NDArray[np.int64]] = defaultdict(lambda: np.zeros(2, np.int64))
        for (_, token), row in zip(keys, rows, strict=True):
            totals[token] += row[4:]
        first = sorted((t for t in totals if totals[t][1]), key=lambda t: (-totals[t][1], t))[:_TOP]
        return [
            {
                "token": text,
                "group": groups.names[int(group)],
                "rejected": int(totals[token][1]),
                "judged": int(totals[token][0]),
                "rate": ratio(totals[token][1], totals[token][0]),
            }
            for token, text, group in zip(first, texts(first), groups.of(np.array(first, np.int64)), strict=True)
        ]

    def _offered(self, groups: TokenGroups, texts: Any) -> list[dict[str, Any]]:
        first = sorted(self._proposed, key=lambda t: (-self._proposed[t], t))[:_TOP]
        instead = [self._instead[token].most_common(1)[0] for token in first]
        return [
            {
                "token": text,
                "group": groups.names[int(group)],
                "rejected": self._proposed[token],
                "mostly_for": wanted,
                "of_them": times,
            }
            for token, text, group, wanted, (_, times) in zip(
                first,
                texts(first),
                groups.of(np.array(first, np.int64)),
                texts([w for w, _ in instead]),
                instead,
                strict=True,
            )
        ]


def compared(rows: NDArray[np.int64]) -> dict[str, Any]:
    """Sums and paired test of tokens [N, 6]."""
    total = rows.sum(0)

    def side(i: int) -> dict[str, Any]:
        judged, rejected = int(total[2 * i]), int(total[2 * i + 1])
        return {"judged": judged, "rejected": rejected, "rate": ratio(rejected, judged)}

    return {"before": side(0), "after": side(1), "test": paired(rows)}


def paired(rows: NDArray[np.int64]) -> dict[str, Any]:
    """Wilcoxon's signed-rank test over the rejection rates of tokens, after against before, two-sided.

    `difference` is the mean of the differences, weighted by the harmonic mean of how often a token was judged on either
    side. Positions of one answer depend on each other, which the test does not know: take small p with caution.
    """
    pairs = rows[(rows[:, 0] >= MIN_JUDGED) & (rows[:, 2] >= MIN_JUDGED)].astype(np.float64)
    found: dict[str, Any] = {"pairs": len(pairs), "difference": None, "p": None}
    if len(pairs) < MIN_PAIRS:
        return found
    differences: FloatArray = pairs[:, 3] / pairs[:, 2] - pairs[:, 1] / pairs[:, 0]
    weights = 2 / (1 / pairs[:, 0] + 1 / pairs[:, 2])
    found["difference"] = float(np.average(differences, weights=weights))
    moved = differences[differences != 0]
    found["p"] = float(stats.wilcoxon(moved).pvalue) if len(moved) >= MIN_PAIRS else 1.0
    return found


def holm(values: Mapping[str, float | None]) -> dict[str, float | None]:
    """p-values adjusted for there being several of them (Holm 1979); None stays None."""
    known = sorted((p, name) for name, p in values.items() if p is not None)
    found: dict[str, float | None] = dict.fromkeys(values)
    highest = 0.0
    for rank, (p, name) in enumerate(known):
        highest = max(highest, min(1.0, p * (len(known) - rank)))
        found[name] = highest
    return found


def collect(traces: Iterable[Trace], side: Callable[[float], int]) -> Rejections:
    """The traces, counted."""
    found = Rejections(side)
    for trace in traces:
        found.add(trace)
    return found
