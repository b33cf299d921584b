"""The daemon's time series: requests and events collected in memory, written now and then, read for a period.

No request waits for it: what a store that is down cannot take is kept for an hour, then lost and counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from adaptd import events
from adaptd.config import Config
from adaptd.errors import ConfigError, RequestRefused
from adaptd.log import logger
from adaptd.models import load
from adaptd.models.vocabulary import token_texts
from adaptd.report.columns import WIDTH, request_counts, trace_counts
from adaptd.report.monitor import Finished
from adaptd.report.token_groups import TokenGroups
from adaptd.report.trends import tables, trends
from adaptd.values import moment
from buffers.errors import TableUnavailable
from buffers.series import KINDS, OTHER, Counts, Point, Series, Window
from buffers.table import NO_KEY, Key, ReplayTable

_log = logger(__name__)
#: Minutes, and events, kept while the store is away.
_MINUTES, _EVENTS = 60, 256
#: The daemon's own kinds of events, as the series calls them.
_KINDS = {"promoted by hand": "promoted", "rollback": "rolled_back"}


@dataclass(frozen=True, slots=True)
class Period:
    """What the series holds of a period."""

    start: float
    until: float
    window: Window
    by_domain: dict[str, Counts]
    history: list[dict[str, Any]]
    """Every event remembered, oldest first."""
    groups: tuple[str, ...]

    @property
    def events(self) -> list[dict[str, Any]]:
        """Those of the period."""
        return [event for event in self.history if event["at"] >= self.start]


class Trending:
    """Owns the series of one daemon; called in its event loop, reads and writes in threads.

    Args:
      clock: unix seconds.
    """

    def __init__(self, config: Config, clock: Callable[[], float] = time.time) -> None:
        self._config, self._clock = config, clock
        self._on = config.trends.enabled
        self._series: Series | None = None
        self._minutes: dict[tuple[int, str], Counts] = {}
        self._events: deque[tuple[str, float, dict[str, Any]]] = deque(maxlen=_EVENTS)
        self._turn = asyncio.Lock()
        #: The groups' names and rules; with the vocabulary, `_groups`, once that is needed.
        self._rules = TokenGroups(lambda _: (), config.trends.groups)
        self._groups: TokenGroups | None = None
        self._groups_since = 0.0
        self._described = False
        self._last_key: Key | None = None
        self.counts = {"written": 0, "lost": 0, "events_lost": 0}
        self.error: str | None = None

    def connect(self, series: Series, table: ReplayTable) -> None:
        """Write to this series from now on, and look at the traces of this table; what came before is kept until then."""
        self._series, self._table = series, table

    def observe(self, item: Finished) -> None:
        """Count a finished request."""
        if self._on:
            self._count(self._clock(), item.domain, request_counts(item))

    def _count(self, at: float, domain: str, counts: Counts) -> None:
        """Of one minute as many names are kept as the series tells apart."""
        minute = int(at // 60)
        if (minute, domain) not in self._minutes and len(self._minutes) >= _MINUTES * self._config.trends.domains:
            domain = OTHER
        held = self._minutes.get((minute, domain))
        self._minutes[minute, domain] = counts if held is None else held + counts

    def remember(self, kind: str, at: float, fields: dict[str, Any]) -> None:
        """Keep an event of the daemon, if it is of a kind that trends show."""
        kind = _KINDS.get(kind, kind)
        if not self._on or kind not in KINDS:
            return
        refused = fields.get("refused", ())
        for version in refused:
            self._put_event("quarantined", at, {"version": version, "reason": fields.get("reason")})
        self._put_event(kind, at, fields)

    def _put_event(self, kind: str, at: float, fields: dict[str, Any]) -> None:
        self.counts["events_lost"] += len(self._events) == _EVENTS
        self._events.append((kind, at, fields))

    async def write(self) -> None:
        """Write what was collected; what cannot be written now is written later, or lost and counted."""
        if not self._on or self._series is None:
            return
        async with self._turn:
            minutes, self._minutes = self._minutes, {}
            pending = list(self._events)
            self._events.clear()
            try:
                await asyncio.to_thread(self._write, self._series, minutes, pending)
                self.error = None
            except Exception as error:  # whatever it is, it must cost points, not the daemon
                said = str(error) if isinstance(error, TableUnavailable) else f"{type(error).__name__}: {error}"
                if self.error is None:
                    _log.warning(events.TRENDS_UNAVAILABLE, error=said[:200])
                self.error = said
            finally:
                self._keep(minutes, pending)

    def _write(self, series: Series, minutes: dict[tuple[int, str], Counts], pending: list[Any]) -> None:
        """Takes out of `minutes` and `pending` what was written."""
        while pending:
            kind, at, fields = pending[0]
            series.remember(kind, at, **fields)
            del pending[0]
        for minute, domain in list(minutes):
            # The middle of the minute: it lies in one bucket of every ring.
            series.add([Point(minute * 60 + 30, domain, minutes[minute, domain])])
            del minutes[minute, domain]
            self.counts["written"] += 1
        self._describe(series)
        series.add(self._newest_traces())

    def _keep(self, minutes: dict[tuple[int, str], Counts], pending: list[Any]) -> None:
        """What was not written, for the next time; minutes that waited too long are lost."""
        for (minute, domain), counts in minutes.items():
            if minute < self._clock() // 60 - _MINUTES:
                self.counts["lost"] += int(counts[0])
            else:
                self._count(minute * 60, domain, counts)
        for event in reversed(pending):
            if len(self._events) == _EVENTS:
                self.counts["events_lost"] += 1
            else:
                self._events.appendleft(event)

    def _newest_traces(self) -> list[Point]:
        """Counts by entropy and token group of the traces that came since the last time, at most `trends.traces`."""
        limit = self._config.trends.traces
        if not limit:
            return []
        if self._last_key is None:  # what an earlier daemon saw is counted already
            self._last_key = self._table.info().newest_key
            return []
        samples = self._table.all("recent", limit, self._last_key)
        groups = self.token_groups() if samples else None
        found: dict[tuple[int, str], Counts] = {}
        for sample in samples:
            self._last_key = max(self._last_key or NO_KEY, sample.info.key)
            where = int(sample.trace.created_at // 60), sample.trace.domain or "default"
            found[where] = found.get(where, np.zeros(WIDTH, np.int64)) + trace_counts(sample.trace, groups)
        return [Point(minute * 60 + 30, domain, counts) for (minute, domain), counts in found.items()]

    def token_groups(self) -> TokenGroups | None:
        """The vocabulary in groups; None where neither draft nor target comes with a tokenizer. Takes a second at first."""
        if self._groups is None:
            for part in ("draft", "target"):
                with contextlib.suppress(ConfigError):
                    folder = load.resolve(getattr(self._config, part).model, part)
                    texts = token_texts(load.load_tokenizer(folder))
                    self._groups = TokenGroups(texts, self._config.trends.groups)
                    break
        return self._groups

    def _describe(self, series: Series) -> None:
        """Keep beside the series which groups its columns mean, and since when."""
        if self._described:
            return
        held = json.loads(series.about() or "{}")
        if held.get("rules") != self._rules.fingerprint:
            since = self._clock() if held else 0.0
            held = {"groups": self._rules.names, "rules": self._rules.fingerprint, "since": since}
            series.describe(json.dumps(held))
        self._groups_since, self._described = float(held["since"]), True

    async def period(self, since: str) -> Period:
        """What the series holds since then or since the first traffic after it, and until now.

        Raises:
          RequestRefused: `since` is neither an age nor a time, or nothing is kept. TableUnavailable.
        """
        if not self._on or self._series is None:
            why = "the daemon is loading: ask again" if self._on else "trends.enabled is false: set it to true"
            raise RequestRefused(f"there are no trends, since {why}")
        until = self._clock()
        try:
            start = moment(since, until)
        except ValueError as error:
            raise RequestRefused(str(error)) from None
        await self.write()
        window, history = await asyncio.to_thread(_read, self._series, start)
        return Period(start, until, window, tables(window, self._groups_since), history, self._rules.names)

    async def read(self, since: str) -> dict[str, Any]:
        """Trends since then as JSON values; empty, with `error`, where the store does not answer.

        Raises:
          RequestRefused: as `period`.
        """
        try:
            found = await self.period(since)
        except TableUnavailable as error:
            empty = Window(60, int(self._clock()), {})
            now = self._clock()
            return {**trends(since, now, now, empty, {}, [], ()), "error": str(error)}
        return trends(since, found.start, found.until, found.window, found.by_domain, found.events, found.groups)

    def status(self) -> dict[str, Any]:
        """Plain JSON values: whether points reach the store, and how many did not."""
        waiting = int(sum(counts[0] for counts in self._minutes.values()))
        return {"on": self._on, "waiting": waiting, **self.counts, "error": self.error}


def _read(series: Series, start: float) -> tuple[Window, list[dict[str, Any]]]:
    """A period that begins with the first traffic may be within reach of a finer ring."""
    window = series.read(start)
    if (first := _first(window)) > start:
        window = series.read(first)
    lead = (_first(window) - window.first) // window.step_s
    rows = {name: counts[lead:] for name, counts in window.counts.items()}
    return Window(window.step_s, _first(window), rows), series.events(0.0)


def _first(window: Window) -> int:
    """Start of the first bucket that is not empty; of the window where all are."""
    busy = np.flatnonzero(sum(rows.sum(1) for rows in window.counts.values()))
    return window.first + int(busy[0]) * window.step_s if len(busy) else window.first
