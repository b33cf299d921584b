"""The series in a dictionary, for tests and for trying things out: what buffers/redis_series.py does, within one process."""

import threading
import time
from collections.abc import Callable, Sequence

import numpy as np

from buffers.series import EVENTS, OTHER, RINGS, Series, field, pack, unpack


class MemorySeries(Series):
    """Series that ends with its process."""

    def __init__(self, domains: int = 32, clock: Callable[[], float] = time.time) -> None:
        super().__init__(domains, clock)
        self._lock = threading.RLock()
        self.reset()

    def reset(self) -> None:
        """See Series.reset."""
        with self._lock:
            self._seen: dict[str, float] = {}
            self._rings: dict[int, dict[str, bytes]] = {ring.step_s: {} for ring in RINGS}
            self._lists: dict[str, list[bytes]] = {}
            self._text = ""

    def about(self) -> str:
        """See Series.about."""
        return self._text

    def describe(self, text: str) -> None:
        """See Series.describe."""
        self._text = text

    def _add(self, rows: Sequence[tuple[float, str, bytes]]) -> None:
        with self._lock:
            self._forget()
            for at, domain, packed in rows:
                name = self._place(domain, at)
                for ring in RINGS:
                    bucket = int(at // ring.step_s)
                    where = field(ring, bucket, name)
                    held = self._rings[ring.step_s].get(where)
                    before = unpack(held) if held else (bucket, np.zeros(0, np.int64))
                    if before[0] > bucket:
                        continue
                    added = np.frombuffer(packed, "<u4").astype(np.int64)
                    if before[0] == bucket:
                        short, long = sorted((before[1], added), key=len)
                        added = long.copy()
                        added[: len(short)] += short
                    self._rings[ring.step_s][where] = bucket.to_bytes(4, "little") + pack(added)

    def _forget(self) -> None:
        """Gives up the places, and the rows, of domains that no ring can show any more."""
        gone = [name for name, at in self._seen.items() if at <= self._clock() - RINGS[-1].reach_s]
        for name in gone:
            del self._seen[name]
            for ring in RINGS:
                for slot in range(ring.slots):
                    self._rings[ring.step_s].pop(f"{slot}/{name}", None)

    def _place(self, domain: str, at: float) -> str:
        full = len(self._seen.keys() - {OTHER}) >= self.domains
        name = OTHER if domain not in self._seen and full else domain
        self._seen[name] = max(at, self._seen.get(name, at))
        return name

    def _names(self) -> list[str]:
        with self._lock:
            return sorted(self._seen)

    def _rows(self, step_s: int, fields: Sequence[str]) -> list[bytes | None]:
        with self._lock:
            return [self._rings[step_s].get(name) for name in fields]

    def _push(self, kind: str, event: bytes) -> None:
        with self._lock:
            self._lists[kind] = [event, *self._lists.get(kind, [])][:EVENTS]

    def _listed(self, kind: str) -> list[bytes]:
        with self._lock:
            return list(self._lists.get(kind, []))
