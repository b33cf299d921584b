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
import math
import multiprocessing
import os
import random
import signal
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
from adaptd.sidecar.share import CaptureShare
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


class Busy:
    """ASGI application around another, with a clock that stands still while nothing is asked: what an account of capture
    saves up between two measurements, it would not have on a server that is busy all the time.
    """

    def __init__(self) -> None:
        self.app: Any = None
        self._idle, self._since, self._in_flight = 0.0, time.monotonic(), 0

    def clock(self) -> float:
        """Seconds with at least one request."""
        return (time.monotonic() if self._in_flight else self._since) - self._idle

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve one connection."""
        if not self._in_flight:
            self._idle += time.monotonic() - self._since
        self._in_flight += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self._in_flight -= 1
            self._since = time.monotonic()


def serve(url: str, port: int, depth: int, share: float, budget: float, told: Any) -> None:
    """The proxy with its capture thread and a buffer in memory; runs until killed. Keeps `told` at what was decided."""
    config = UpstreamConfig(url=url, top_logprobs=depth)

    async def run() -> None:
        upstream = Upstream(config)
        assert await upstream.wait(30), upstream.error
        able, busy = upstream.capabilities, Busy()
        governor = CaptureShare(share, budget, math.inf, 60.0, random.Random(0).random, busy.clock)
        assert not able.reason, able.reason
        table = MemoryTable("bench", TableLimits(max_bytes=2**28, ttl_s=None, anchors=1024, reserved_max_bytes=2**25))
        capture = CaptureThread(TraceWriter(table).append, 1024)

        def planner(path: str, body: bytes, _: Labels) -> Plan | None:
            return plan(path, body, top_logprobs=able.top_logprobs, capture=governor.why_not())

        def report(done: Done) -> None:
            told[0] += 1
            told[1] += done.plan.captured
            told[2] = governor.status()["cost"]
            if done.plan.captured:
                capture.put(Captured(done.seen, figures(done.seen.speculative), ABOUT))

        busy.app = Proxy(make_client(config), planner, report, share=governor)
        config_ = uvicorn.Config(busy, port=port, log_config=None, access_log=False, lifespan="off")
        await uvicorn.Server(config_).serve()

    # The event loop that `adaptd serve` takes.
    with asyncio.Runner(loop_factory=uvicorn.Config("", log_config=None).get_loop_factory()) as runner:
        runner.run(run())


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


class Way:
    """How to ask, and the proxy that is asked if there is one."""

    def __init__(self, load: Load, process: Any = None, told: Any = None) -> None:
        self.load, self.process, self.told = load, process, told

    def measure(self, concurrency: int, requests: int) -> dict[str, float]:
        """One round; of a proxy also its processor time, and which part of the requests it captured."""
        before, counts = self._cpu_s(), list(self.told) if self.told else []
        found = asyncio.run(self.load.run(concurrency, requests))
        if self.process is not None:
            found["cpu_ms_per_token"] = 1e3 * (self._cpu_s() - before) / (requests * self.load.tokens)
            found["captured"] = (self.told[1] - counts[1]) / max(1, self.told[0] - counts[0])
            found["cost"] = self.told[2]
        return found

    def _cpu_s(self) -> float:
        if self.process is None:
            return 0.0
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def start_proxy(url: str, depth: int, share: float, budget: float) -> tuple[Any, str, Any]:
    """The proxy in a process of its own, answering."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    told = context.Array("d", 3)
    process = context.Process(target=serve, args=(url, port, depth, share, budget, told), daemon=True)
    process.start()
    here = f"http://127.0.0.1:{port}"
    for _ in range(600):
        try:
            httpx.get(f"{here}/health", timeout=2)
            return process, here, told
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
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--depth", type=int, nargs="+", default=[8], help="top_logprobs")
    parser.add_argument(
        "--share", type=float, nargs="*", default=[1.0], help="shares of the requests captured; may be none"
    )
    parser.add_argument("--budget", type=float, nargs="*", default=[0.02], help="upstream.capture_budget")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    ways = {"direct": Way(Load(options.url, options.model, options.tokens, {}))}
    for depth in options.depth if options.share else ():
        asked = {"return_token_ids": True, "return_tokens_as_token_ids": True, "logprobs": True, "top_logprobs": depth}
        ways[f"direct, top {depth} asked"] = Way(Load(options.url, options.model, options.tokens, asked))
    first = options.depth[0]
    proxies = {"proxy, no capture": (first, 0.0, 1.0)}
    for depth in options.depth:
        proxies |= {f"proxy, top {depth} of {share:.0%}": (depth, share, 1.0) for share in options.share}
        proxies |= {f"proxy, budget {budget:.0%}, top {depth}": (depth, 1.0, budget) for budget in options.budget}
    for name, settings in proxies.items():
        process, url, told = start_proxy(options.url, *settings)
        ways[name] = Way(Load(url, options.model, options.tokens, {}), process, told)
    rows: dict[str, dict[int, list[dict[str, float]]]] = {name: {c: [] for c in options.concurrency} for name in ways}
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        measure(ways, rows, options)
    except KeyboardInterrupt:
        print("interrupted: what was measured until then", file=sys.stderr)
    for way in ways.values():
        if way.process is not None:
            way.process.terminate()
    show(rows)
    if options.json:
        options.json.write_text(json.dumps({"options": vars(options) | {"json": None}, "rows": rows}, indent=1))


def measure(
    ways: dict[str, Way], rows: dict[str, dict[int, list[dict[str, float]]]], options: argparse.Namespace
) -> None:
    """All rounds, into `rows`."""
    for number in range(options.rounds + 1):
        for concurrency in options.concurrency:
            # About as long: one request alone is served faster, but not sixteen times as fast.
            requests = options.requests if concurrency > 4 else max(4, options.requests // 5)
            order = list(ways)
            random.Random(number).shuffle(order)
            found = {name: ways[name].measure(concurrency, requests) for name in order}
            for name, row in found.items() if number else ():  # the first round warms everything up
                rows[name][concurrency].append(row)
        print(f"round {number} of {options.rounds}", file=sys.stderr)


def show(rows: dict[str, dict[int, list[dict[str, float]]]]) -> None:
    """Ratios to direct access of the same round: of throughput over all rounds together, because a budget is spent in some
    of them and saved in others; of times the median; each with (lowest to highest).
    """
    keys = ("tokens_per_s", "ttft_p50", "ttft_p99", "itl_p50", "itl_p99")
    for concurrency, base in rows["direct"].items():
        if not base:
            continue
        plain = ", ".join(
            f"{key} {statistics.median(r[key] for r in base) * (1 if key == 'tokens_per_s' else 1e3):.1f}"
            for key in keys
        )
        print(f"\nconcurrency {concurrency}; direct: {plain} (tokens/s, ms)")
        print(f"{'way':28}" + "".join(f"{key:>24}" for key in keys) + f"{'proxy CPU ms/token':>20}{'captured':>10}")
        for name, by in rows.items():
            cells = []
            for key in keys:
                ratios = [r[key] / b[key] for r, b in zip(by[concurrency], base, strict=True)]
                middle = statistics.median(ratios)
                if key == "tokens_per_s":
                    middle = sum(1 / b[key] for b in base) / sum(1 / r[key] for r in by[concurrency])
                cells.append(f"{middle:.3f} ({min(ratios):.2f} to {max(ratios):.2f})")
            own = [
                statistics.mean(r[key] for r in by[concurrency]) if key in by[concurrency][0] else math.nan
                for key in ("cpu_ms_per_token", "captured")
            ]
            print(f"{name:28}" + "".join(f"{cell:>24}" for cell in cells) + f"{own[0]:>20.3f}{own[1]:>10.0%}")


if __name__ == "__main__":
    main()
