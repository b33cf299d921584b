"""The time series of a deployment: sums of what was served, by domain, in rings of fixed size; and a bounded list of events.

A point is a vector of counts that add up. It is added to one bucket of every ring; a ring has a fixed number of buckets,
and a bucket that comes round again begins at zero, so that old data gets coarser and then goes, and memory has a bound
that is known beforehand: see docs/trends.md. What the columns mean is the caller's business.

Rules every implementation keeps (tests/contract/test_series.py):

- Adding is atomic for each point, and several processes may add to one deployment.
- At most `domains` names are told apart, any further one is counted as OTHER; one that was not seen for as long as the
  coarsest ring reaches back gives its place up.
- A count ends at 2**32 - 1 and does not wrap.
- Only TableUnavailable (the store) and ValueError (the caller's arguments) are raised.
"""

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]

#: The name of what is beyond the bound of names.
OTHER: Final = "other"
#: Kinds of events; of each the newest EVENTS are kept.
KINDS: Final = ("drift", "promoted", "rejected", "rolled_back", "quarantined")
EVENTS: Final = 512
#: Longest event as JSON, in bytes; texts in it are cut until it fits.
_EVENT_BYTES: Final = 512
#: Longest vector of counts.
MAX_WIDTH: Final = 128
_CEILING: Final = 2**32 - 1
#: Points added, or rows read, in one call: bounds the time one call holds the store.
_POINTS, _ROWS = 64, 2000


class Ring(NamedTuple):
    """`slots` buckets of `step_s` seconds."""

    step_s: int
    slots: int

    @property
    def reach_s(self) -> int:
        """Seconds that it reaches back, the bucket of now included."""
        return self.step_s * self.slots


#: A day by the minute, two weeks by the quarter of an hour, half a year by two hours.
RINGS: Final = (Ring(60, 1440), Ring(900, 1344), Ring(7200, 2196))


@dataclass(frozen=True, slots=True)
class Point:
    """Counts to be added: whole numbers from 0, [W] with W up to MAX_WIDTH; `at` in unix seconds."""

    at: float
    domain: str
    counts: Counts


@dataclass(frozen=True, slots=True)
class Window:
    """Sums of a period, from the finest ring that reaches back to its start."""

    step_s: int
    first: int  # unix seconds, start of the first bucket
    counts: Mapping[str, Counts]  # [B, W] by domain; domains without any are left out

    @property
    def at(self) -> list[int]:
        """[B] start of each bucket in unix seconds; empty where there are no domains."""
        n = max((len(rows) for rows in self.counts.values()), default=0)
        return [self.first + i * self.step_s for i in range(n)]


class Series(ABC):
    """The series of one deployment over the primitives that a store provides.

    domains: names told apart. clock gives unix seconds. Any thread may call any method.
    """

    def __init__(self, domains: int = 32, clock: Callable[[], float] = time.time) -> None:
        if not 1 <= domains <= 256:
            raise ValueError(f"domains ({domains}) must lie in 1..256")
        self.domains = domains
        self._clock = clock

    @abstractmethod
    def _add(self, rows: Sequence[tuple[float, str, bytes]]) -> None:
        """Adds (time, domain, packed counts) to every ring."""

    @abstractmethod
    def _names(self) -> list[str]:
        """Domains that have a place, OTHER included where it was used."""

    @abstractmethod
    def _rows(self, step_s: int, fields: Sequence[str]) -> list[bytes | None]:
        """Rows of a ring by field."""

    @abstractmethod
    def _push(self, kind: str, event: bytes) -> None:
        """Puts an event in front of its list and cuts the list to EVENTS."""

    @abstractmethod
    def _listed(self, kind: str) -> list[bytes]:
        """The events of a kind, newest first."""

    @abstractmethod
    def about(self) -> str:
        """What `describe` last said; empty before."""

    @abstractmethod
    def describe(self, text: str) -> None:
        """Keeps a short text beside the series: what its columns mean."""

    @abstractmethod
    def reset(self) -> None:
        """Removes everything."""

    def add(self, points: Sequence[Point]) -> None:
        """Adds the counts of every point. Raises ValueError for counts that are none; TableUnavailable."""
        rows = [(point.at, point.domain, pack(point.counts)) for point in points]
        for start in range(0, len(rows), _POINTS):
            self._add(rows[start : start + _POINTS])

    def read(self, since: float, until: float | None = None) -> Window:
        """Sums from `since` to `until` (now), both unix seconds. What is older than the coarsest ring is gone.

        Raises TableUnavailable.
        """
        now = self._clock()
        until = now if until is None else min(until, now)
        ring = next((ring for ring in RINGS if now - since <= ring.reach_s), RINGS[-1])
        last = int(until // ring.step_s)
        first = max(int(since // ring.step_s), int(now // ring.step_s) - ring.slots + 1)
        buckets = range(first, last + 1)
        counts = {}
        for name in self._names():
            if (rows := self._read_rows(ring, name, buckets)) is not None:
                counts[name] = rows
        return Window(ring.step_s, first * ring.step_s, counts)

    def _read_rows(self, ring: Ring, name: str, buckets: range) -> Counts | None:
        found: list[tuple[int, Counts]] = []
        for start in range(0, len(buckets), _ROWS):
            chunk = buckets[start : start + _ROWS]
            rows = self._rows(ring.step_s, [field(ring, bucket, name) for bucket in chunk])
            for i, (bucket, row) in enumerate(zip(chunk, rows, strict=True), start):
                if row is not None and (read := unpack(row))[0] == bucket:
                    found.append((i, read[1]))
        if not found:
            return None
        table = np.zeros((len(buckets), max(len(values) for _, values in found)), np.int64)
        for i, values in found:
            table[i, : len(values)] = values
        return table

    def remember(self, kind: str, at: float, **details: Any) -> None:
        """Adds an event. Raises ValueError for a kind that is none; TableUnavailable."""
        if kind not in KINDS:
            raise ValueError(f"kind ({kind!r}) must be one of {', '.join(KINDS)}")
        self._push(kind, _encoded({"at": at, "kind": kind, **details}))

    def events(self, since: float, kinds: Iterable[str] = KINDS) -> list[dict[str, Any]]:
        """Events from `since` on, oldest first. Raises TableUnavailable."""
        found = [json.loads(event) for kind in kinds for event in reversed(self._listed(kind))]
        return sorted((event for event in found if event["at"] >= since), key=lambda event: float(event["at"]))


def field(ring: Ring, bucket: int, name: str) -> str:
    """Where the row of a bucket lies in its ring."""
    return f"{bucket % ring.slots}/{name}"


def pack(counts: Counts) -> bytes:
    """Counts as little-endian uint32, zeros at the end left out.

    Raises ValueError if they are not whole numbers from 0, or too many.
    """
    if counts.ndim != 1 or len(counts) > MAX_WIDTH or not np.issubdtype(counts.dtype, np.integer):
        raise ValueError(
            f"counts ({counts.dtype} {counts.shape}) must be a vector of at most {MAX_WIDTH} whole numbers"
        )
    if len(counts) and counts.min() < 0:
        raise ValueError(f"counts ({counts.min()}) must be at least 0")
    used = np.flatnonzero(counts)
    return np.minimum(counts[: used[-1] + 1 if len(used) else 0], _CEILING).astype("<u4").tobytes()


def unpack(row: bytes) -> tuple[int, Counts]:
    """Bucket number and counts of a row as it is stored."""
    values = np.frombuffer(row, "<u4").astype(np.int64)
    return int(values[0]), values[1:]


def _encoded(event: dict[str, Any]) -> bytes:
    """The event as JSON of at most _EVENT_BYTES: texts are shortened, then what is still too long is left out."""
    for longest in (300, 100, 30):
        short = {name: value[:longest] if isinstance(value, str) else value for name, value in event.items()}
        if len(text := json.dumps(short).encode()) <= _EVENT_BYTES:
            return text
    return json.dumps({"at": event["at"], "kind": event["kind"]}).encode()
