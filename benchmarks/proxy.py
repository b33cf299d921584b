"""What the proxy costs: direct, with the server's log-probabilities alone, through the proxy, and with capture.

    python benchmarks/proxy.py --url http://127.0.0.1:8000 --model pocket

Against a vLLM server that runs. The ways alternate within each round, so that whatever else the machine does falls on all
of them alike; what is printed are medians over rounds of each way's ratio to direct access in the same round. Client and
proxy run in processes of their own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import random
import socket
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import uvicorn

from adaptd.sections import UpstreamConfig
from adaptd.sidecar.capture import Captured, CaptureThread
from adaptd.sidecar.headers import Labels
from adaptd.sidecar.proxy import Done, Proxy
from adaptd.sidecar.request import Plan, plan
from adaptd.sidecar.steps import figures
from adaptd.sidecar.traces import Provenance
from adaptd.sidecar.upstream import Upstream, make_client
from buffers.memory_table import MemoryTable
from buffers.table import TableLimits
from buffers.writer import TraceWriter

QUESTIONS = ("What causes asthma?", "Ann has 3 apples and buys 5. How many?", "Weather in Paris?", "Add two numbers.")
ABOUT = Provenance(
    target_id="t",
    draft_version=0,
    domain="d",
    tenant="",
    temperature=0.0,
    top_p=1.0,
    top_k=0,
    max_tokens=2048,
    reserved_share=0.1,
)


def serve(url: str, port: int, depth: int, share: float) -> None:
    """The proxy with its capture thread and a buffer in memory; runs until killed."""
    config = UpstreamConfig(url=url, top_logprobs=depth)

    async def run() -> None:
        upstream = Upstream(config)
        assert await upstream.wait(30), upstream.error
        able, rng = upstream.capabilities, random.Random(0)
        assert not able.reason, able.reason
        table = MemoryTable("bench", TableLimits(max_bytes=2**28, ttl_s=None, anchors=1024, reserved_max_bytes=2**25))
        capture = CaptureThread(TraceWriter(table).append, 1024)

        def planner(path: str, body: bytes, _: Labels) -> Plan | None:
            why_not = None if rng.random() < share else "not in the share"
            return plan(path, body, top_logprobs=able.top_logprobs, capture=why_not)

        def report(done: Done) -> None:
            if done.plan.captured:
                capture.put(Captured(done.seen, figures(done.seen.speculative), ABOUT))

        app = Proxy(make_client(config), planner, report)
        await uvicorn.Server(uvicorn.Config(app, port=port, log_config=None, lifespan="off")).serve()

    asyncio.run(run())


class Load:
    """One way of asking, at one concurrency."""

    def __init__(self, url: str, model: str, tokens: int, extra: dict[str, Any]) -> None:
        self.url, self.model, self.tokens, self.extra = url, model, tokens, extra

    async def run(self, concurrency: int, requests: int) -> dict[str, float]:
        """Tokens per second, and time to first token and between events in seconds at p50 and p99."""
        first: list[float] = []
        between: list[float] = []
        waiting = iter(range(requests))
        async with httpx.AsyncClient(
            base_url=self.url, timeout=600, limits=httpx.Limits(max_connections=None)
        ) as client:

            async def one(index: int) -> None:
                messages = [{"role": "user", "content": QUESTIONS[index % len(QUESTIONS)]}]
                body = {"model": self.model, "messages": messages, "max_tokens": self.tokens, "temperature": 0}
                body |= {"stream": True, "ignore_eos": True, **self.extra}
                sent = last = time.perf_counter()
                seen = 0
                async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
                    answer.raise_for_status()
                    async for _ in answer.aiter_raw():
                        now = time.perf_counter()
                        seen += 1
                        if seen == 2:  # the first event carries the role alone
                            first.append(now - sent)
                        elif seen > 2:
                            between.append(now - last)
                        last = now

            async def worker() -> None:
                for index in waiting:
                    await one(index)

            started = time.perf_counter()
            await asyncio.gather(*(worker() for _ in range(concurrency)))
            seconds = time.perf_counter() - started
        found = {"tokens_per_s": requests * self.tokens / seconds}
        for name, values in (("ttft", first), ("itl", between)):
            found |= {f"{name}_p{q}": float(np.percentile(values, q)) for q in (50, 99)}
        return found


def start_proxy(url: str, depth: int, share: float) -> tuple[Any, str]:
    """The proxy in a process of its own, answering."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(url, port, depth, share), daemon=True)
    process.start()
    here = f"http://127.0.0.1:{port}"
    for _ in range(600):
        try:
            httpx.get(f"{here}/health", timeout=2)
            return process, here
        except httpx.TransportError:
            time.sleep(0.1)
    raise SystemExit("the proxy did not start")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=32, help="a round, way and concurrency")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--depth", type=int, nargs="+", default=[8], help="top_logprobs")
    parser.add_argument("--share", type=float, nargs="+", default=[1.0, 0.5], help="share of the requests captured")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    ways = {"direct": Load(options.url, options.model, options.tokens, {})}
    processes = []
    for depth in options.depth:
        asked = {"return_token_ids": True, "return_tokens_as_token_ids": True, "logprobs": True, "top_logprobs": depth}
        ways[f"direct, top {depth} asked"] = Load(options.url, options.model, options.tokens, asked)
    for depth, share in [(options.depth[0], 0.0), *((d, s) for d in options.depth for s in options.share)]:
        process, url = start_proxy(options.url, depth, share)
        processes.append(process)
        name = f"proxy, top {depth} of {share:.0%}" if share else "proxy, no capture"
        ways[name] = Load(url, options.model, options.tokens, {})
    rows: dict[str, dict[int, list[dict[str, float]]]] = {name: {1: [], 16: []} for name in ways}
    for number in range(options.rounds + 1):
        for concurrency, requests in ((1, max(4, options.requests // 4)), (16, options.requests)):
            order = list(ways)
            random.Random(number).shuffle(order)
            for name in order:
                found = asyncio.run(ways[name].run(concurrency, requests))
                if number:  # the first round warms everything up
                    rows[name][concurrency].append(found)
        print(f"round {number} of {options.rounds}", file=sys.stderr)
    for process in processes:
        process.terminate()
    show(rows)
    if options.json:
        options.json.write_text(json.dumps({"options": vars(options) | {"json": None}, "rows": rows}, indent=1))


def show(rows: dict[str, dict[int, list[dict[str, float]]]]) -> None:
    """Ratios to direct access of the same round, median (lowest to highest)."""
    keys = ("tokens_per_s", "ttft_p50", "ttft_p99", "itl_p50", "itl_p99")
    for concurrency in (1, 16):
        base = rows["direct"][concurrency]
        plain = ", ".join(
            f"{key} {statistics.median(r[key] for r in base) * (1 if key == 'tokens_per_s' else 1e3):.1f}"
            for key in keys
        )
        print(f"\nconcurrency {concurrency}; direct: {plain} (tokens/s, ms)")
        print(f"{'way':28}" + "".join(f"{key:>24}" for key in keys))
        for name, by in rows.items():
            cells = []
            for key in keys:
                ratios = [r[key] / b[key] for r, b in zip(by[concurrency], base, strict=True)]
                cells.append(f"{statistics.median(ratios):.3f} ({min(ratios):.2f} to {max(ratios):.2f})")
            print(f"{name:28}" + "".join(f"{cell:>24}" for cell in cells))


if __name__ == "__main__":
    main()
