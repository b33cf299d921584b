"""The series in Redis. `scripts/series.lua` adds; reading asks for the rows of a period, at most _ROWS a call.

Keys, beside those that the script's header lists: `trends:about` (string) and `trends:events:<kind>` (list of JSON, newest
first). What survives a restart of Redis is what it persists itself.
"""

import time
from collections.abc import Callable, Sequence
from typing import Final, cast

from redis import Redis

from buffers.connection import Scripted, key_names, masked, translated
from buffers.series import EVENTS, KINDS, OTHER, RINGS, Series


class RedisSeries(Series):
    """Series on a Redis server, shared by every process that names the same deployment.

    Making one does not connect. Raises ValueError for a URL or deployment name it cannot use.
    """

    def __init__(self, url: str, deployment: str, domains: int = 32, clock: Callable[[], float] = time.time) -> None:
        super().__init__(domains, clock)
        self._url = url
        self._scripted = Scripted(url, "series.lua")
        names = ("domains", *(str(ring.step_s) for ring in RINGS), "about", *(f"events:{kind}" for kind in KINDS))
        #: Every Redis key of this series.
        self.keys: Final = key_names(deployment, *(f"trends:{name}" for name in names))
        self._by_name = dict(zip(names, self.keys, strict=True))

    def __repr__(self) -> str:
        """Names the server, never the password."""
        return f"RedisSeries({masked(self._url)!r}, {self.keys[0]!r})"

    def close(self) -> None:
        """Closes the connections. The series opens new ones if it is used again."""
        self._scripted.close()

    def _client(self) -> Redis:
        return self._scripted.open()[0]

    def reset(self) -> None:
        """See Series.reset."""
        with translated(self._url):
            self._client().unlink(*self.keys)

    def about(self) -> str:
        """See Series.about."""
        with translated(self._url):
            return cast("bytes", self._client().get(self._by_name["about"]) or b"").decode()

    def describe(self, text: str) -> None:
        """See Series.describe."""
        with translated(self._url):
            self._client().set(self._by_name["about"], text)

    def _add(self, rows: Sequence[tuple[float, str, bytes]]) -> None:
        rings = [number for ring in RINGS for number in ring]
        points: list[str | bytes] = [part for at, domain, packed in rows for part in (repr(at), domain, packed)]
        with translated(self._url):
            self._scripted.open()[1](
                keys=self.keys[: 1 + len(RINGS)], args=(repr(self._clock()), self.domains, OTHER, *rings, *points)
            )

    def _names(self) -> list[str]:
        with translated(self._url):
            return sorted(
                name.decode() for name in cast("list[bytes]", self._client().zrange(self._by_name["domains"], 0, -1))
            )

    def _rows(self, step_s: int, fields: Sequence[str]) -> list[bytes | None]:
        with translated(self._url):
            return cast("list[bytes | None]", self._client().hmget(self._by_name[str(step_s)], list(fields)))

    def _push(self, kind: str, event: bytes) -> None:
        key = self._by_name[f"events:{kind}"]
        with translated(self._url):
            pipeline = self._client().pipeline()
            pipeline.lpush(key, event)
            pipeline.ltrim(key, 0, EVENTS - 1)
            pipeline.execute()

    def _listed(self, kind: str) -> list[bytes]:
        with translated(self._url):
            return cast("list[bytes]", self._client().lrange(self._by_name[f"events:{kind}"], 0, -1))
