"""Connections to Redis: one way to make a client, one place where its errors become TableUnavailable."""

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from typing import Final, cast
from urllib.parse import urlsplit

from redis import Redis, RedisError
from redis.backoff import NoBackoff
from redis.cluster import RedisCluster
from redis.commands.core import Script
from redis.exceptions import RedisClusterException
from redis.retry import Retry

from buffers.errors import TableUnavailable

#: Accepted URL schemes. The last two name any node of a Redis Cluster.
SCHEMES: Final = ("redis", "rediss", "unix", "redis+cluster", "rediss+cluster")

_DEPLOYMENT: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")

#: Seconds to wait for one reply. A table call moves a few megabytes at most and must not hold its caller for long.
_SOCKET_TIMEOUT_S: Final = 5.0
_CONNECT_TIMEOUT_S: Final = 2.0
#: Bytes asked of the socket at once; the index of a large table is a few megabytes in one reply.
_READ_SIZE: Final = 256 * 1024


def check(url: str) -> None:
    """Raises ValueError, naming the allowed schemes, if the URL has another one."""
    if urlsplit(url).scheme not in SCHEMES:
        raise ValueError(f"buffer url ({masked(url)}) must start with {', '.join(s + '://' for s in SCHEMES)}")


def key_names(deployment: str, *names: str) -> tuple[str, ...]:
    """Redis keys of a deployment, all in one slot of a cluster. Raises ValueError for a name that cannot be part of one."""
    if not _DEPLOYMENT.fullmatch(deployment):
        raise ValueError(f"deployment ({deployment!r}) must be letters, digits, '_', '.' or '-': it names Redis keys")
    return tuple(f"adaptd:{{{deployment}}}:{name}" for name in names)


def client(url: str) -> Redis:
    """A client for a URL of SCHEMES. Raises ValueError for another URL.

    Connects at the first command; to a cluster at once, to learn its layout, raising the client's own errors.
    """
    check(url)
    if "+cluster" in urlsplit(url).scheme:
        cluster = RedisCluster.from_url(
            url.replace("+cluster", "", 1),
            socket_timeout=_SOCKET_TIMEOUT_S,
            socket_connect_timeout=_CONNECT_TIMEOUT_S,
        )
        # Not a subclass, but the commands used here are the same: scripts with keys, zrange, hscan, ping, close.
        return cast("Redis", cluster)
    # One retry on a fresh connection: enough for a server that restarted since the last call. Waiting longer is the
    # caller's business, which knows whether anyone waits for it.
    return Redis.from_url(
        url,
        socket_timeout=_SOCKET_TIMEOUT_S,
        socket_connect_timeout=_CONNECT_TIMEOUT_S,
        socket_read_size=_READ_SIZE,
        retry=Retry(NoBackoff(), 1),
    )


class Scripted:
    """A client and a script bound to it, made at first use and used by all threads.

    script: file in buffers/scripts. Raises ValueError for a URL that it cannot use.
    """

    def __init__(self, url: str, script: str) -> None:
        check(url)
        self._url, self._script = url, script
        self._opening = threading.Lock()
        self._opened: tuple[Redis, Script] | None = None

    def open(self) -> tuple[Redis, Script]:
        """Both; raises what `client` raises."""
        with self._opening:
            if self._opened is None:
                redis = client(self._url)
                text = resources.files("buffers").joinpath("scripts", self._script).read_text()
                self._opened = (redis, redis.register_script(text))
            return self._opened

    def close(self) -> None:
        """Closes the connections; new ones are opened at the next use."""
        with self._opening:
            if self._opened:
                self._opened[0].close()
            self._opened = None


def connect(url: str) -> Redis:
    """A client that has answered a PING. Raises TableUnavailable if none does, ValueError for a URL it cannot read."""
    with translated(url):
        connected = client(url)
        try:
            connected.ping()
        except (RedisError, RedisClusterException):
            connected.close()
            raise
    return connected


@contextmanager
def translated(url: str) -> Iterator[None]:
    """Turns any error of the Redis client into TableUnavailable naming the server, without its password."""
    try:
        yield
    except (RedisError, RedisClusterException, OSError) as exc:
        raise TableUnavailable(
            f"redis at {masked(url)} does not serve adaptd ({type(exc).__name__}: {exc}); "
            "check that it runs, accepts writes and has memory left"
        ) from exc


def masked(url: str) -> str:
    """The URL without user and password."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl() if parts.netloc else url
