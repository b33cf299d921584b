"""The replay table in Redis. `scripts/table.lua` holds every atomic command and the list of keys; this file calls it.

Sampling moves 20 bytes a trace (the index of the stratum, one reply) and then the chosen payloads; never the others.
Works on a single server and on Redis Cluster: all keys of a deployment share one hash tag.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, cast

import numpy as np
from numpy.typing import NDArray

from buffers.base_table import CHUNK, INDEX_ENTRY, BaseTable, Row, Stored
from buffers.connection import Scripted, key_names, masked, translated
from buffers.table import NO_KEY, STRATA, Key, Stratum, TableInfo, TableLimits

#: Index entries an `age_out` looks at in one call.
_SCAN: Final = 1000


class RedisTable(BaseTable):
    """ReplayTable on a Redis server, shared by every process that names the same deployment.

    Making one does not connect: a table can be made while Redis is down and works once it is up. Raises ValueError for a
    URL or deployment name it cannot use.
    """

    def __init__(
        self, url: str, deployment: str, limits: TableLimits, clock: Callable[[], float] = time.time, salt: str = ""
    ) -> None:
        super().__init__(deployment, limits, clock, salt)
        self._url = url
        self._scripted = Scripted(url, "table.lua")
        #: Every Redis key of this table, in the order the script's header lists them.
        self.keys: Final[tuple[str, ...]] = key_names(
            deployment,
            "stats",
            "payload",
            "meta",
            "domains",
            *(f"{stratum}:{part}" for stratum in STRATA for part in ("index", "slots", "order")),
        )

    def __repr__(self) -> str:
        """Names server and deployment, never the password."""
        return f"RedisTable({masked(self._url)!r}, {self.deployment!r})"

    def close(self) -> None:
        """Closes the connections. The table opens new ones if it is used again."""
        self._scripted.close()

    def info(self) -> TableInfo:
        """See ReplayTable.info."""
        self._trim()
        raw_stats, raw_domains, *sizes = self._call("info")
        stats, domains = _pairs(raw_stats), _pairs(raw_domains)
        return TableInfo(
            sizes=dict(zip(STRATA, sizes, strict=True)),
            bytes={s: int(stats.get(f"bytes:{s}", 0)) for s in STRATA},
            stored_bytes=int(stats.get("bytes:stored", 0)),
            by_domain={
                s: {f.partition("/")[2]: int(n) for f, n in domains.items() if f.partition("/")[0] == s} for s in STRATA
            },
            inserted_total=int(stats.get("inserted_total", 0)),
            evicted_total=int(stats.get("evicted_total", 0)),
            expired_total=int(stats.get("expired_total", 0)),
            sampled_total=int(stats.get("sampled_total", 0)),
            refused_total={f.partition(":")[2]: int(n) for f, n in stats.items() if f.startswith("refused:")},
            newest_key=int(stats.get("seq", NO_KEY)),
        )

    def reset(self) -> None:
        """See ReplayTable.reset."""
        self._call("reset")

    # --- primitives -------------------------------------------------------------------------------------------------

    def _call(self, command: str, *args: bytes | str | float) -> Any:
        limits, now = self.limits, self._clock()
        with translated(self._url):
            return self._scripted.open()[1](
                keys=self.keys,
                args=(
                    command,
                    repr(now),
                    -1 if limits.ttl_s is None else limits.ttl_s,
                    limits.max_bytes,
                    limits.anchors,
                    limits.reserved_max_bytes,
                    self._salt,
                    # The first key is the time in ms: should Redis lose its data, keys still grow, and nobody mistakes
                    # a new trace for one he knew.
                    int(now * 1000),
                    *args,
                ),
            )

    def _trim(self, more: int = 1) -> None:
        while more:
            (more,) = self._call("trim")

    def _store(self, rows: Sequence[Row]) -> list[Key]:
        args: list[bytes | str | float] = []
        for row in rows:
            args += (int(row.reserved), repr(row.priority), row.target_id, row.domain, row.payload)
        more, *keys = self._call("insert", *args)
        self._trim(more)
        return [int(key) for key in keys]

    def _size(self, stratum: Stratum) -> int:
        self._trim()
        return int(self._call("size", stratum))

    def _index(self, stratum: Stratum) -> NDArray[np.void]:
        self._trim()
        return np.frombuffer(self._call("index", stratum), dtype=INDEX_ENTRY)

    def _read(self, stratum: Stratum, keys: Sequence[Key], *, count: bool) -> list[Stored | None]:
        reply = self._call("read", stratum, int(count), *keys)
        found: list[Stored | None] = []
        for payload, packed in zip(reply[::2], reply[1::2], strict=True):
            if payload is None:
                found.append(None)
                continue
            (entry,) = np.frombuffer(packed, dtype=INDEX_ENTRY)
            found.append(Stored(payload, float(entry["priority"]), int(entry["times"])))
        return found

    def _newest(self, stratum: Stratum, since_key: Key, limit: int | None) -> list[Key]:
        if limit is not None and limit <= 0:
            return []
        self._trim()
        order = self.keys[4 + 3 * STRATA.index(stratum) + 2]
        with translated(self._url):
            if stratum == "anchors":  # by lot: the lowest are a uniform choice
                names = self._scripted.open()[0].zrange(order, 0, -1 if limit is None else limit - 1)
            else:
                number = -1 if limit is None else limit
                names = self._scripted.open()[0].zrevrangebyscore(order, "+inf", f"({since_key}", start=0, num=number)
        return sorted(int(name) for name in cast("list[bytes]", names))

    def _update(self, updates: Mapping[Key, float]) -> int:
        return int(self._call("update", *(item for key, p in updates.items() for item in (key, repr(float(p))))))

    def _discard(self, keys: Sequence[Key], refused: str | None) -> int:
        return int(self._call("discard", refused or "", *keys))

    def _foreign(self, target_id: str) -> Iterator[Key]:
        cursor = None
        while cursor != 0:
            with translated(self._url):
                cursor, metas = self._scripted.open()[0].hscan(self.keys[2], cursor or 0, count=_SCAN)
            for key, meta in cast("dict[bytes, bytes]", metas).items():
                if json.loads(meta)[2] != target_id:
                    yield int(key)

    def _restart_anchors(self) -> None:
        self._call("restart")
        keys = self._newest("recent", NO_KEY, None)
        for start in range(0, len(keys), CHUNK):
            (more,) = self._call("offer", *keys[start : start + CHUNK])
            self._trim(more)


def _pairs(flat: Sequence[bytes]) -> dict[str, str]:
    texts = [item.decode() for item in flat]
    return dict(zip(texts[::2], texts[1::2], strict=True))
