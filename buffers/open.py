"""A replay table or a time series from a URL: the one place that knows which implementation a scheme means."""

from urllib.parse import urlsplit

from buffers.connection import SCHEMES, masked
from buffers.memory_series import MemorySeries
from buffers.memory_table import MemoryTable
from buffers.redis_series import RedisSeries
from buffers.redis_table import RedisTable
from buffers.series import Series
from buffers.table import TableLimits


def open_table(
    url: str,
    deployment: str,
    *,
    max_bytes: int,
    ttl_s: float | None,
    anchors: int,
    reserved_max_bytes: int,
) -> MemoryTable | RedisTable:
    """The table of a deployment behind `url`: memory://, redis://, rediss:// or unix://.

    Does not connect: a table can be opened while Redis is down. For a private server, start one with
    `buffers.embedded.start_embedded` and pass its url. `max_bytes` bounds recent and anchors together and
    `reserved_max_bytes` the reserved stratum, both in bytes of encoded traces; `ttl_s` is in seconds, None for ever;
    `anchors` is in traces. Raises ValueError for another scheme or a limit that makes no sense.
    """
    limits = TableLimits(max_bytes=max_bytes, ttl_s=ttl_s, anchors=anchors, reserved_max_bytes=reserved_max_bytes)
    if _in_memory(url):
        return MemoryTable(deployment, limits)
    return RedisTable(url, deployment, limits)


def open_series(url: str, deployment: str, *, domains: int) -> Series:
    """The time series of a deployment, beside its table; `domains` is the number of names told apart.

    Does not connect. Raises ValueError as `open_table`.
    """
    return MemorySeries(domains) if _in_memory(url) else RedisSeries(url, deployment, domains)


def _in_memory(url: str) -> bool:
    """Whether the URL means this process and not Redis; raises ValueError if it means neither."""
    scheme = urlsplit(url).scheme
    if scheme == "memory" or scheme in SCHEMES:
        return scheme == "memory"
    remedy = "; for an embedded server call start_embedded and pass its url" if url == "embedded" else ""
    allowed = ", ".join(f"{s}://" for s in ("memory", *SCHEMES))
    raise ValueError(f"buffer url ({masked(url)}) must start with {allowed}{remedy}")
