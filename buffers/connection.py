"""Connections to Redis: one way to make a client, one place where its errors become TableUnavailable."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, cast
from urllib.parse import urlsplit

from redis import Redis, RedisError
from redis.backoff import NoBackoff
from redis.cluster import RedisCluster
from redis.exceptions import RedisClusterException
from redis.retry import Retry

from buffers.errors import TableUnavailable

#: Accepted URL schemes. The last two name any node of a Redis Cluster.
SCHEMES: Final = ("redis", "rediss", "unix", "redis+cluster", "rediss+cluster")

#: Seconds to wait for one reply. A table call moves a few megabytes at most and must not hold its caller for long.
_SOCKET_TIMEOUT_S: Final = 5.0
_CONNECT_TIMEOUT_S: Final = 2.0
#: Bytes asked of the socket at once; the index of a large table is a few megabytes in one reply.
_READ_SIZE: Final = 256 * 1024


def check(url: str) -> None:
    """Raises ValueError, naming the allowed schemes, if the URL has another one."""
    if urlsplit(url).scheme not in SCHEMES:
        raise ValueError(f"buffer url ({masked(url)}) must start with {', '.join(s + '://' for s in SCHEMES)}")


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
            f"redis at {masked(url)} does not serve the replay table ({type(exc).__name__}: {exc}); "
            "check that it runs, accepts writes and has memory left"
        ) from exc


def masked(url: str) -> str:
    """The URL without user and password."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl() if parts.netloc else url
