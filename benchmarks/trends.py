"""What the time series costs in Redis once every bucket of every ring is filled.

    python benchmarks/trends.py --domains 1 3 33 --depth 4

Prints the sum of MEMORY USAGE over the rings for so many domains, and for the events, as many and as long as are kept.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
from redis import Redis

from adaptd.report.columns import MAX_DEPTH, WIDTH
from buffers.embedded import start_embedded
from buffers.redis_series import RedisSeries
from buffers.series import EVENTS, KINDS, RINGS, Point

#: Larger than the counts of a bucket will be, so that no number is stored shorter than it would be.
COUNT = 2**31


def used(redis: Redis, keys: list[str]) -> float:
    """MiB."""
    return sum(redis.memory_usage(key, samples=0) or 0 for key in keys) / 2**20


def main() -> None:
    """Fill and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--domains", type=int, nargs="+", default=[1, 3, 33])
    parser.add_argument("--depth", type=int, default=4, help="k of the decoders")
    args = parser.parse_args()
    row = np.full(WIDTH - 2 * (MAX_DEPTH - args.depth), COUNT, np.int64)
    now = time.time()
    times = sorted({now - i * ring.step_s for ring in RINGS for i in range(ring.slots)})
    with tempfile.TemporaryDirectory() as folder:
        server = start_embedded(Path(folder))
        redis = Redis(unix_socket_path=server.url.removeprefix("unix://").partition("?")[0])
        try:
            for domains in args.domains:
                series = RedisSeries(server.url, f"bench-{domains}", domains=domains)
                for name in range(domains):
                    series.add([Point(at, f"domain-{name}", row) for at in times])
                rings = [key for key in series.keys if "events" not in key]
                print(f"{domains} domains, k = {args.depth}: {used(redis, rings):.1f} MiB")
            for kind in KINDS:
                for _ in range(EVENTS):
                    series.remember(kind, now, version=1, reason="x" * 512)
            print(f"events: {used(redis, [key for key in series.keys if 'events' in key]):.1f} MiB")
        finally:
            server.close()


if __name__ == "__main__":
    main()
