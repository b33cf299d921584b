"""The replay table in this process' memory: `memory://`. The same contract as in Redis, lost when the process ends."""

import heapq
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from buffers.base_table import INDEX_ENTRY, BaseTable, Row, Stored
from buffers.table import NO_KEY, STRATA, Key, Stratum, TableInfo, TableLimits, anchor_draw


@dataclass(slots=True)
class _Record:
    """One stored payload."""

    row: Row
    inserted_at: float  # unix seconds
    size: int  # bytes of the payload


@dataclass(slots=True)
class _Entry:
    """One trace's place in a stratum."""

    priority: float
    times_sampled: int = 0


@dataclass(slots=True)
class _State:
    """Everything `reset` forgets."""

    records: dict[Key, _Record] = field(default_factory=dict)
    # Dictionaries keep insertion order, so the first key of recent and reserved is the oldest.
    strata: dict[Stratum, dict[Key, _Entry]] = field(default_factory=lambda: {s: {} for s in STRATA})
    sizes: Counter[Stratum] = field(default_factory=Counter)  # bytes
    stored_bytes: int = 0
    lots: list[tuple[float, Key]] = field(default_factory=list)  # heap of (-lot, key) of the anchors, with leftovers
    anchor_ceiling: float = 1.0
    totals: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)


class MemoryTable(BaseTable):
    """ReplayTable in dictionaries under one lock. Payloads are kept encoded, so that budgets mean the same as in Redis."""

    def __init__(
        self, deployment: str, limits: TableLimits, clock: Callable[[], float] = time.time, salt: str = ""
    ) -> None:
        super().__init__(deployment, limits, clock, salt)
        self._lock = threading.RLock()
        self._state = _State()
        self._seq = NO_KEY

    def __repr__(self) -> str:
        """Names the deployment."""
        return f"MemoryTable({self.deployment!r})"

    def info(self) -> TableInfo:
        """See ReplayTable.info."""
        with self._lock:
            self._trim()
            s = self._state
            return TableInfo(
                sizes={name: len(entries) for name, entries in s.strata.items()},
                bytes={name: s.sizes[name] for name in STRATA},
                stored_bytes=s.stored_bytes,
                by_domain={n: dict(Counter(s.records[k].row.domain for k in e)) for n, e in s.strata.items()},
                inserted_total=s.totals["inserted"],
                evicted_total=s.totals["evicted"],
                expired_total=s.totals["expired"],
                sampled_total=s.totals["sampled"],
                refused_total=dict(s.refused),
                newest_key=self._seq,
            )

    def reset(self) -> None:
        """See ReplayTable.reset."""
        with self._lock:
            self._state = _State()

    # --- primitives -------------------------------------------------------------------------------------------------

    def _store(self, rows: Sequence[Row]) -> list[Key]:
        with self._lock:
            return [self._store_one(row) for row in rows]

    def _store_one(self, row: Row) -> Key:
        s, now = self._state, self._clock()
        self._seq = self._seq or int(now * 1000)
        if len(row.payload) > self.limits.largest(row.reserved):
            s.refused["too_large"] += 1
            return NO_KEY
        self._seq += 1
        s.records[self._seq] = _Record(row, now, len(row.payload))
        if row.reserved:
            self._add("reserved", self._seq, row.priority)
        else:
            s.stored_bytes += len(row.payload)
            self._add("recent", self._seq, row.priority)
            self._offer(self._seq, row.priority)
        s.totals["inserted"] += 1
        self._trim()
        return self._seq

    def _size(self, stratum: Stratum) -> int:
        with self._lock:
            self._trim()
            return len(self._state.strata[stratum])

    def _index(self, stratum: Stratum) -> NDArray[np.void]:
        with self._lock:
            self._trim()
            rows = [(key, e.priority, e.times_sampled) for key, e in self._state.strata[stratum].items()]
        return np.array(rows, dtype=INDEX_ENTRY)

    def _read(self, stratum: Stratum, keys: Sequence[Key], *, count: bool) -> list[Stored | None]:
        with self._lock:
            found: list[Stored | None] = []
            for key in keys:
                entry = self._state.strata[stratum].get(key)
                if entry is None:
                    found.append(None)
                    continue
                if count:
                    entry.times_sampled += 1
                    self._state.totals["sampled"] += 1
                found.append(Stored(self._state.records[key].row.payload, entry.priority, entry.times_sampled))
            return found

    def _newest(self, stratum: Stratum, since_key: Key, limit: int | None) -> list[Key]:
        if limit is not None and limit <= 0:
            return []
        with self._lock:
            self._trim()
            keys = [key for key in self._state.strata[stratum] if key > since_key]
        if limit is None:
            return sorted(keys)
        if stratum == "anchors":  # by lot: the lowest are a uniform choice
            return sorted(sorted(keys, key=self._lot)[:limit])
        return sorted(keys)[-limit:]

    def _update(self, updates: Mapping[Key, float]) -> int:
        with self._lock:
            known = 0
            for key, priority in updates.items():
                held = [e for entries in self._state.strata.values() if (e := entries.get(key)) is not None]
                for entry in held:
                    entry.priority = float(priority)
                known += bool(held)
            return known

    def _discard(self, keys: Sequence[Key], refused: str | None) -> int:
        with self._lock:
            removed = sum(self._drop_everywhere(key) for key in keys)
            if refused and removed:
                self._state.refused[refused] += removed
            return removed

    def _foreign(self, target_id: str) -> Iterator[Key]:
        with self._lock:
            return iter([key for key, record in self._state.records.items() if record.row.target_id != target_id])

    def _restart_anchors(self) -> None:
        with self._lock:
            self._state.anchor_ceiling = 1.0
            for key, entry in self._state.strata["recent"].items():
                self._offer(key, entry.priority)
            self._trim()

    # --- bookkeeping, all under the lock ----------------------------------------------------------------------------

    def _lot(self, key: Key) -> float:
        return anchor_draw(self._salt, key)

    def _add(self, stratum: Stratum, key: Key, priority: float) -> None:
        self._state.strata[stratum][key] = _Entry(priority)
        self._state.sizes[stratum] += self._state.records[key].size

    def _drop(self, stratum: Stratum, key: Key) -> bool:
        """Takes a trace out of one stratum, and its payload out of the table once no stratum holds it."""
        s = self._state
        if s.strata[stratum].pop(key, None) is None:
            return False
        size = s.records[key].size
        s.sizes[stratum] -= size
        if not any(key in entries for entries in s.strata.values()):
            if stratum != "reserved":
                s.stored_bytes -= size
            del s.records[key]
        return True

    def _drop_everywhere(self, key: Key) -> bool:
        held = [stratum for stratum in STRATA if key in self._state.strata[stratum]]
        for stratum in held:
            self._drop(stratum, key)
        return bool(held)

    def _offer(self, key: Key, priority: float) -> None:
        """Admits a trace whose lot is below every lot turned out so far; see `offer` in scripts/table.lua."""
        lot = self._lot(key)
        if lot < self._state.anchor_ceiling and key not in self._state.strata["anchors"]:
            self._add("anchors", key, priority)
            heapq.heappush(self._state.lots, (-lot, key))

    def _trim(self) -> None:
        """Cuts the reservoir to its capacity, expires and evicts."""
        s, limits = self._state, self.limits
        anchors = s.strata["anchors"]
        while len(anchors) > limits.anchors or s.sizes["anchors"] > limits.max_bytes / 2:
            negative, key = heapq.heappop(s.lots)
            if self._drop("anchors", key):
                s.anchor_ceiling = -negative
        for stratum in ("recent", "reserved"):
            entries = s.strata[stratum]
            while limits.ttl_s is not None and entries:
                key = next(iter(entries))
                if s.records[key].inserted_at > self._clock() - limits.ttl_s:
                    break
                self._drop(stratum, key)
                s.totals["expired"] += 1
        self._evict("recent", limits.max_bytes)
        self._evict("reserved", limits.reserved_max_bytes)

    def _evict(self, stratum: Stratum, max_bytes: int) -> None:
        s = self._state
        while s.strata[stratum] and (s.sizes[stratum] if stratum == "reserved" else s.stored_bytes) > max_bytes:
            self._drop(stratum, next(iter(s.strata[stratum])))
            s.totals["evicted"] += 1
