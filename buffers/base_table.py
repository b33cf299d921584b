"""What every replay table does the same way, over nine primitives that a store provides.

Encoding, the draw and its top-up, decoding and the removal of what cannot be decoded live here once, so that the Redis
and the in-memory table cannot drift apart.
"""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Final, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from buffers.codec import decode, encode
from buffers.errors import TraceDecodeError
from buffers.table import (
    NO_KEY,
    STRATA,
    Key,
    ReplaySample,
    SampleInfo,
    Selector,
    Stratum,
    TableInfo,
    TableLimits,
)
from buffers.trace import Trace

#: One row of a stratum's index, as it lies in Redis: little-endian and packed.
INDEX_ENTRY: Final = np.dtype([("key", "<f8"), ("priority", "<f8"), ("times", "<u4")])

#: Traces a store is asked for, or given, in one call: bounds the time one call holds the store.
CHUNK: Final = 64

#: Draws repeated at most this often to replace traces that vanished or could not be read.
_TOP_UPS: Final = 3

_T = TypeVar("_T")


class Row(NamedTuple):
    """One encoded trace on its way in."""

    payload: bytes
    priority: float
    reserved: bool
    target_id: str
    domain: str


class Stored(NamedTuple):
    """One payload on its way out."""

    payload: bytes
    priority: float
    times_sampled: int


class BaseTable(ABC):
    """ReplayTable over primitives.

    clock gives unix seconds. salt seeds the lots of the anchors (the deployment's name unless told otherwise); every
    process that writes to a deployment must use the same.
    """

    def __init__(
        self, deployment: str, limits: TableLimits, clock: Callable[[], float] = time.time, salt: str = ""
    ) -> None:
        self.deployment = deployment
        self.limits = limits
        self._clock = clock
        self._salt = salt or deployment

    # --- primitives -------------------------------------------------------------------------------------------------

    @abstractmethod
    def _store(self, rows: Sequence[Row]) -> list[Key]:
        """Stores at most CHUNK rows, then expires and evicts: one atomic change."""

    @abstractmethod
    def _size(self, stratum: Stratum) -> int:
        """Traces in a stratum, expired ones excluded."""

    @abstractmethod
    def _index(self, stratum: Stratum) -> NDArray[np.void]:
        """[N] INDEX_ENTRY of a stratum, in any order, expired traces excluded."""

    @abstractmethod
    def _read(self, stratum: Stratum, keys: Sequence[Key], *, count: bool) -> list[Stored | None]:
        """At most CHUNK payloads, None where the key has left the stratum; `count` notes them as sampled."""

    @abstractmethod
    def _newest(self, stratum: Stratum, since_key: Key, limit: int | None) -> list[Key]:
        """Keys above `since_key` by key, at most the newest `limit`; of the anchors those with the lowest lots."""

    @abstractmethod
    def _update(self, updates: Mapping[Key, float]) -> int:
        """Sets at most CHUNK priorities; how many keys were known."""

    @abstractmethod
    def _discard(self, keys: Sequence[Key], refused: str | None) -> int:
        """Removes at most CHUNK keys from every stratum, counting them as refused for that reason; how many."""

    @abstractmethod
    def _foreign(self, target_id: str) -> Iterator[Key]:
        """Keys of all traces judged by another target."""

    @abstractmethod
    def _restart_anchors(self) -> None:
        """Opens the reservoir to everything that is still in recent."""

    @abstractmethod
    def info(self) -> TableInfo:
        """The table's counts, in one consistent snapshot."""

    @abstractmethod
    def reset(self) -> None:
        """Removes every trace and counter of this table and nothing else. Keys go on growing."""

    # --- the contract -----------------------------------------------------------------------------------------------

    def insert(self, traces: Sequence[Trace], priorities: Sequence[float]) -> list[Key]:
        """See ReplayTable.insert."""
        if len(traces) != len(priorities):
            raise ValueError(f"priorities ({len(priorities)}) must be as many as traces ({len(traces)})")
        for priority in priorities:
            _check_priority(priority)
        rows = [
            Row(encode(trace), float(priority), bool(trace.reserved), trace.target_id, trace.domain)
            for trace, priority in zip(traces, priorities, strict=True)
        ]
        return [key for chunk in _chunks(rows) for key in self._store(chunk)]

    def can_sample(self, n: int, stratum: Stratum = "recent") -> bool:
        """See ReplayTable.can_sample."""
        return self._size(_known(stratum)) >= n

    def sample(
        self, n: int, selector: Selector, rng: np.random.Generator, stratum: Stratum = "recent"
    ) -> list[ReplaySample]:
        """See ReplayTable.sample."""
        pool = self._index(_known(stratum))
        size = len(pool)
        samples: list[ReplaySample] = []
        for _ in range(1 + _TOP_UPS):
            wanted = min(n - len(samples), len(pool))
            if wanted <= 0:
                break
            chosen, probabilities = selector(pool["priority"].astype(np.float64), wanted, rng)
            keys = [int(key) for key in pool["key"][chosen]]
            found = self._readable(stratum, dict.fromkeys(keys), size, count=True)
            for key, probability in zip(keys, probabilities, strict=True):
                if key in found:
                    info, trace = found[key]
                    samples.append(ReplaySample(info._replace(probability=float(probability)), trace))
            # Whatever was drawn is not drawn again: it is either here already or gone.
            pool = np.delete(pool, chosen)
        return samples

    def fresh(self, since_key: Key, limit: int) -> list[ReplaySample]:
        """See ReplayTable.fresh."""
        keys = self._newest("recent", since_key, limit)
        return list(self._readable("recent", keys, self._size("recent"), count=True).values())

    def all(self, stratum: Stratum, limit: int | None = None, since_key: Key = NO_KEY) -> list[ReplaySample]:
        """See ReplayTable.all."""
        keys = [key for key in self._newest(_known(stratum), since_key, limit) if key > since_key]
        return list(self._readable(stratum, keys, self._size(stratum), count=False).values())

    def spread(self, stratum: Stratum, n: int) -> list[ReplaySample]:
        """See ReplayTable.spread."""
        keys = self._newest(_known(stratum), NO_KEY, None)
        chosen = keys if len(keys) <= n else [keys[int(i)] for i in np.linspace(0, len(keys) - 1, max(n, 0))]
        return list(self._readable(stratum, chosen, len(keys), count=False).values())

    def update_priorities(self, updates: Mapping[Key, float]) -> int:
        """See ReplayTable.update_priorities."""
        for priority in updates.values():
            _check_priority(priority)
        return sum(self._update(dict(chunk)) for chunk in _chunks(updates.items()))

    def remove(self, keys: Sequence[Key]) -> int:
        """See ReplayTable.remove."""
        return sum(self._discard(chunk, None) for chunk in _chunks(keys))

    def age_out(self, target_id: str) -> int:
        """See ReplayTable.age_out."""
        removed = sum(self._discard(chunk, None) for chunk in _chunks(self._foreign(target_id)))
        if removed:
            # Lots already refused would keep the reservoir closed to most of the new target's traces.
            self._restart_anchors()
        return removed

    def _readable(self, stratum: Stratum, keys: Iterable[Key], size: int, *, count: bool) -> dict[Key, ReplaySample]:
        """The traces that are still there and decode, in the order asked for; the undecodable are removed."""
        samples: dict[Key, ReplaySample] = {}
        refused: dict[str, list[Key]] = {}
        for chunk in _chunks(keys):
            for key, stored in zip(chunk, self._read(stratum, chunk, count=count), strict=True):
                if stored is None:
                    continue
                try:
                    trace = decode(stored.payload)
                except TraceDecodeError as exc:
                    refused.setdefault(exc.reason, []).append(key)
                    continue
                info = SampleInfo(key, 1.0, stored.priority, stored.times_sampled, size, stratum)
                samples[key] = ReplaySample(info, trace)
        for reason, bad in refused.items():
            for chunk in _chunks(bad):
                self._discard(chunk, reason)
        return samples


def _check_priority(priority: float) -> None:
    if not (math.isfinite(priority) and priority > 0):
        raise ValueError(f"priority ({priority}) must be finite and above 0; remove() what should never be drawn")


def _known(stratum: Stratum) -> Stratum:
    if stratum not in STRATA:
        raise ValueError(f"stratum ({stratum!r}) must be one of {', '.join(STRATA)}")
    return stratum


def _chunks(items: Iterable[_T]) -> Iterator[list[_T]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, CHUNK)):
        yield chunk
