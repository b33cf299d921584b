"""What `adaptd report` shows of a period: the time series, and the traces that are still in the replay buffer."""

from __future__ import annotations

import asyncio
from typing import Any

from adaptd.app.trending import Period, Trending
from adaptd.errors import BufferAway
from adaptd.report.monitor import ALL
from adaptd.report.rejections import collect
from adaptd.report.split import Baseline, Split, compared, split
from adaptd.report.trends import trends
from buffers.errors import TableUnavailable
from buffers.table import STRATA, ReplayTable
from buffers.trace import Trace


async def report(
    trending: Trending, table: ReplayTable, since: str, baseline: Baseline, n_traces: int, about: dict[str, Any]
) -> dict[str, Any]:
    """The JSON values.

    Args:
      n_traces: traces read of each stratum, spread over it.
      about: keys that go along.

    Raises:
      RequestRefused: as `Trending.period`. BufferAway: the store does not answer.
    """
    try:
        period = await trending.period(since, closer=True)
        return about | await asyncio.to_thread(_report, trending, table, since, period, baseline, n_traces)
    except TableUnavailable as error:
        raise BufferAway(str(error)) from error


def _report(
    trending: Trending, table: ReplayTable, since: str, period: Period, baseline: Baseline, n_traces: int
) -> dict[str, Any]:
    total = period.by_domain[ALL]
    parts, why = split(period.window, total, period.history, baseline)
    found = trends(since, period.start, period.until, period.window, period.by_domain, period.events, period.groups)
    sides = {} if parts is None else compared(period.window, period.by_domain, parts, period.groups)
    return {
        "since": since,
        "baseline": baseline,
        "trends": found,
        "split": None if parts is None else parts._asdict(),
        "why_not_compared": why,
        **sides,
        "tokens": _tokens(trending, _traces(table, period, n_traces), parts),
    }


def _traces(table: ReplayTable, period: Period, n: int) -> list[Trace]:
    """Those of the period, each once."""
    found = {s.info.key: s.trace for stratum in STRATA for s in table.spread(stratum, n)}
    return [trace for _, trace in sorted(found.items()) if period.start <= trace.created_at <= period.until]


def _tokens(trending: Trending, traces: list[Trace], parts: Split | None) -> dict[str, Any] | None:
    """None where there is no tokenizer, or no trace."""
    groups = trending.token_groups() if traces else None
    if groups is None:
        return None
    side = (lambda _: -1) if parts is None else parts.side
    return collect(traces, side).values(groups, groups.texts)
