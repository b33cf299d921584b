"""How fast the replay table is in a real Redis: fill it, sample from it, make it evict.

    python benchmarks/buffer.py                                  200,000 traces into a private embedded server
    python benchmarks/buffer.py --traces 20000 --response 64 --top 32
    python benchmarks/buffer.py --url redis://127.0.0.1:6379/0   into a running one; only its own keys are deleted

Rates are of one client on one thread and include encoding on insert and decoding on sample. 200,000 traces of the
default size need about 0.8 GB of memory in the server. Numbers also go to --json FILE.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from buffers.codec import encode
from buffers.connection import connect
from buffers.embedded import start_embedded
from buffers.redis_table import RedisTable
from buffers.synthetic import synthetic_trace
from buffers.table import TableLimits
from buffers.trace import Trace, is_reserved

UNBOUNDED = 1 << 45  # bytes: the fill itself must not evict


def proportional(
    priorities: NDArray[np.float64], n: int, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Draws with replacement in proportion to priority."""
    sums = np.cumsum(priorities)
    chosen = np.searchsorted(sums, rng.random(n) * sums[-1])
    return chosen, priorities[chosen] / sums[-1]


def timed(calls: int, call: Any) -> NDArray[np.float64]:
    """Seconds of each of that many calls."""
    seconds = np.empty(calls)
    for i in range(calls):
        started = time.perf_counter()
        call()
        seconds[i] = time.perf_counter() - started
    return seconds


def used_memory(url: str) -> int:
    with connect(url) as client:
        return int(client.info("memory")["used_memory"])


def fill(table: RedisTable, shapes: list[Trace], n: int, batch: int, rng: np.random.Generator) -> float:
    """Inserts n traces; seconds."""
    started = time.perf_counter()
    for first in range(0, n, batch):
        ids = [f"bench-{i}" for i in range(first, min(first + batch, n))]
        traces = [
            replace(
                shapes[i % len(shapes)], request_id=name, reserved=is_reserved(name, 0.05), domain=f"domain-{i % 4}"
            )
            for i, name in enumerate(ids, first)
        ]
        table.insert(traces, rng.uniform(0.01, 1.0, len(traces)).tolist())
    return time.perf_counter() - started


def measure(url: str, options: argparse.Namespace) -> dict[str, Any]:
    rng = np.random.default_rng(options.seed)
    shapes = [
        synthetic_trace(rng, n_prompt=16, n_response=options.response, n_top=options.top, n_draft_top=8)
        for _ in range(64)
    ]
    limits = TableLimits(max_bytes=UNBOUNDED, ttl_s=None, anchors=options.anchors, reserved_max_bytes=UNBOUNDED)
    table = RedisTable(url, f"bench-{uuid4().hex}", limits)
    try:
        before = used_memory(url)
        encode_s = timed(200, lambda: encode(shapes[0]))
        fill_s = fill(table, shapes, options.traces, options.batch, rng)
        full = table.info()
        used = used_memory(url) - before
        payload = full.stored_bytes + full.bytes["reserved"]
        sample_s = timed(options.draws, lambda: table.sample(options.sample, proportional, rng))
        anchor_s = timed(options.draws, lambda: table.sample(options.sample, proportional, rng, "anchors"))
        keys = [s.info.key for s in table.sample(options.sample, proportional, rng)]
        update_s = timed(50, lambda: table.update_priorities(dict.fromkeys(keys, 0.5)))
        one = replace(shapes[0], reserved=False)
        room_s = timed(200, lambda: table.insert([one], [1.0]))
        # From here on the table is exactly full: each insert evicts.
        table.limits = replace(limits, max_bytes=table.info().stored_bytes)
        evict_s = timed(200, lambda: table.insert([one], [1.0]))
        evicted = table.info().evicted_total
        # A tenth of the budget goes at once: the next call removes what no longer fits.
        table.limits = replace(limits, max_bytes=int(table.info().stored_bytes * 0.9))
        started = time.perf_counter()
        removed = table.info().evicted_total - evicted
        cut_s = time.perf_counter() - started
        return {
            "machine": f"{platform.platform()}, {os.cpu_count()} CPUs",
            "seed": options.seed,
            "traces": options.traces,
            "payload_bytes_per_trace": round(payload / (full.sizes["recent"] + full.sizes["reserved"])),
            "encode_ms": round(1000 * float(np.median(encode_s)), 3),
            "insert_traces_per_s": round(options.traces / fill_s),
            "fill_s": round(fill_s, 1),
            "sample_traces_per_s": round(options.sample / float(np.median(sample_s))),
            "sample_call_ms": {"median": ms(sample_s, 50), "p99": ms(sample_s, 99), "traces": options.sample},
            "sample_anchors_call_ms": {"median": ms(anchor_s, 50), "p99": ms(anchor_s, 99)},
            "update_priorities_call_ms": ms(update_s, 50),
            "redis_memory_bytes": used,
            "overhead_bytes_per_trace": round((used - payload) / options.traces),
            "insert_one_ms": {"median": ms(room_s, 50), "p99": ms(room_s, 99)},
            "insert_one_evicting_ms": {"median": ms(evict_s, 50), "p99": ms(evict_s, 99), "evicted": evicted},
            "budget_cut_by_10_percent": {"evicted": removed, "seconds": round(cut_s, 3)},
            "sizes": dict(full.sizes),
        }
    finally:
        with connect(url) as client:
            client.unlink(*table.keys)
        table.close()


def ms(seconds: NDArray[np.float64], percentile: float) -> float:
    return round(1000 * float(np.percentile(seconds, percentile)), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=int, default=200_000, help="traces to insert")
    parser.add_argument("--response", type=int, default=16, help="response tokens a trace")
    parser.add_argument("--top", type=int, default=8, help="target candidates kept a position")
    parser.add_argument("--anchors", type=int, default=2000, help="size of the reservoir, in traces")
    parser.add_argument("--batch", type=int, default=64, help="traces an insert")
    parser.add_argument("--sample", type=int, default=16, help="traces a sample")
    parser.add_argument("--draws", type=int, default=50, help="samples timed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--url", help="a running Redis; default: an embedded server of its own")
    parser.add_argument("--json", type=Path, help="write the numbers here as well")
    options = parser.parse_args()
    if options.url:
        result = measure(options.url, options)
    else:
        with tempfile.TemporaryDirectory(prefix="adaptd-bench-") as directory:
            server = start_embedded(directory)
            try:
                result = measure(server.url, options)
            finally:
                server.close()
    for name, value in result.items():
        print(f"{name:28} {value}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
