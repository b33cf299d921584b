"""Several decoders, one machine or two nodes: tokens/s in all, what each costs, and how soon all serve a promoted version.

    python benchmarks/scale.py                 1, 2 and 4 decoders on one node, then on a local Ray cluster of two
    python benchmarks/scale.py --nodes 2 --decoders 2 8 --url redis://127.0.0.1:6379/0

Decoder actors are placed as the daemon places them; nodes of a local cluster are Ray nodes with processes of their own that
share this machine's processors. They meet in Redis (an embedded one without --url) and in the checkpoint store, nowhere else.
As many actors as the largest number run; the smaller numbers are the same actors with the others idle, in turns. Each decoder
under load has --in-flight requests at all times, sampled with seeds. A round is a window of that load, then promotions, each
at a random moment of the followers' interval (`checkpoints.poll_s`): the time from the call of `publish` to a decoder
having swapped, for the first and the last of those that have load; the files are written within it. At the end the same
without any load.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from itertools import count
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil
import ray
from ray.cluster_utils import Cluster as RayNodes

from adaptd.actors.parts import load_draft
from adaptd.app.cluster import Cluster
from adaptd.app.pool import DecoderPool
from adaptd.cli.common import write_result
from adaptd.config import Config, load
from adaptd.decoding.request import DecodeRequest, SamplingParams
from adaptd.models.chat import render_chat
from adaptd.models.load import load_tokenizer, resolve
from adaptd.pocket.shipped import pocket_prompts
from buffers.embedded import start_embedded
from buffers.open import open_table
from checkpoints.store import CheckpointStore

DOMAINS = ("medical", "math", "tools", "code")
WARM_S, PATIENCE_S = 1.0, 60.0
_OBJECT_STORE_BYTES = 100 * 2**20


@contextmanager
def ray_nodes(number: int, cpus: float) -> Iterator[str]:
    """Address of a local Ray cluster of that many nodes, each of so many processors; `local`, started by adaptd, for one."""
    if number == 1:
        yield "local"
        return
    nodes = RayNodes()
    try:
        for _ in range(number):
            nodes.add_node(num_cpus=cpus, object_store_memory=_OBJECT_STORE_BYTES, include_dashboard=False)
        yield nodes.address
    finally:
        nodes.shutdown()


@contextmanager
def redis(url: str | None, home: Path) -> Iterator[str]:
    """URL of the Redis that all meet in."""
    if url:
        yield url
        return
    server = start_embedded(home)
    try:
        yield server.url
    finally:
        server.close()


class Decoders:
    """The actors, in an order in which neighbours are on different nodes."""

    def __init__(self, handles: Sequence[Any]) -> None:
        about = ray.get([h.__ray_call__.remote(_about) for h in handles])
        by_node: dict[str, list[tuple[int, Any]]] = {}
        for (pid, node), handle in zip(about, handles, strict=True):
            by_node.setdefault(node, []).append((pid, handle))
        self.nodes = len(by_node)
        ordered = sorted((at, node, pid) for node, some in by_node.items() for at, (pid, _) in enumerate(some))
        known = {pid: handle for some in by_node.values() for pid, handle in some}
        self.pids = [pid for _, _, pid in ordered]
        self.handles = [known[pid] for pid in self.pids]

    def cpu_s(self) -> tuple[float, float]:
        """Processor seconds so far of the decoders, and of this process with Ray's and Redis's."""
        here = psutil.Process()
        spent = {p.pid: _cpu_s(p) for p in (here, *here.children(recursive=True))}
        own = sum(spent[pid] for pid in self.pids)
        return own, sum(spent.values()) - own

    def memory_bytes(self) -> int:
        """What one more decoder needs: the median of what each shares with nobody."""
        return round(statistics.median(psutil.Process(pid).memory_full_info().uss for pid in self.pids))


def _about(_: Any) -> tuple[int, str]:
    import os

    return os.getpid(), ray.get_runtime_context().get_node_id()


def _cpu_s(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.Error:  # it ended meanwhile
        return 0.0
    return float(times.user + times.system)


class Load:
    """Requests without end to some decoders."""

    def __init__(self, prompts: Sequence[tuple[str, tuple[int, ...]]], tokens: int) -> None:
        self._prompts, self._tokens, self._numbers = prompts, tokens, count()

    async def _ask(self, pool: DecoderPool) -> None:
        while True:
            number = next(self._numbers)
            domain, ids = self._prompts[number % len(self._prompts)]
            params = SamplingParams(temperature=0.8, max_tokens=self._tokens, seed=number, ignore_eos=True)
            request = DecodeRequest(uuid4().hex, ids, params, domain=domain)
            async for _ in pool.generate(request, False):
                pass

    @asynccontextmanager
    async def on(self, handles: Sequence[Any], in_flight: int) -> AsyncIterator[None]:
        """That many at each decoder inside."""
        # One pool a decoder: each has its share at every moment.
        asking = [asyncio.create_task(self._ask(DecoderPool([h]))) for h in handles for _ in range(in_flight)]
        try:
            await asyncio.sleep(WARM_S)
            yield
        finally:
            for task in asking:
                task.cancel()
            ended = await asyncio.gather(*asking, return_exceptions=True)
            for error in ended:
                if isinstance(error, Exception):
                    raise error


async def window(decoders: Decoders, number: int, seconds: float) -> dict[str, float]:
    """Tokens and processor time of the first decoders, while they have load."""
    some = decoders.handles[:number]

    async def emitted() -> Any:
        return sum(status["engine"]["emitted"] for status in await _statuses(some))

    started, before, spent = time.perf_counter(), await emitted(), decoders.cpu_s()
    await asyncio.sleep(seconds)
    tokens, ended, now = await emitted() - before, time.perf_counter(), decoders.cpu_s()
    return {
        "tokens_per_s": tokens / (ended - started),
        "decoder_cpu_ms_per_token": 1e3 * (now[0] - spent[0]) / tokens,
        "other_cpu_ms_per_token": 1e3 * (now[1] - spent[1]) / tokens,
    }


async def _statuses(handles: Sequence[Any]) -> list[dict[str, Any]]:
    return list(await asyncio.gather(*(h.status.remote() for h in handles)))


class Promotions:
    """Publishes day-0 weights again and again: every version is new and decodes alike."""

    def __init__(self, config: Config) -> None:
        draft, identity = load_draft(config, "cpu", "float32", serving=False)
        self._tensors, self._identity = draft.state(), identity
        self._store, self._poll_s = CheckpointStore(config.home / "checkpoints"), config.checkpoints.poll_s
        self._rng = random.Random(0)

    def publish(self) -> int:
        """The new version."""
        about = {name: getattr(self._identity, name) for name in ("base_id", "tokenizer_hash", "scope", "scope_config")}
        return self._store.publish(self._tensors, **about, gate={}, window={}, config={}).version

    async def fan_out(self, handles: Sequence[Any]) -> dict[str, float]:
        """Milliseconds until the version was written and until the first and the last decoder served it; longest pause."""
        await asyncio.sleep(self._rng.uniform(0, self._poll_s))
        asked = time.time()
        version = await asyncio.to_thread(self.publish)
        written = time.time()
        while True:
            found = await _statuses(handles)
            swaps = [status["swap"] for status in found if status["draft_version"] == version]
            # The counters follow the version: until then they are of the swap before.
            if len(swaps) == len(handles) and all((swap["swapped_at"] or 0.0) > asked for swap in swaps):
                break
            if time.time() - asked > PATIENCE_S:
                raise SystemExit(f"a decoder does not serve version {version} after {PATIENCE_S:.0f} s; see its log")
            await asyncio.sleep(0.05)
        self._store.prune(3)
        after = [1e3 * (swap["swapped_at"] - asked) for swap in swaps]
        return {
            "written_ms": 1e3 * (written - asked),
            "first_ms": min(after),
            "last_ms": max(after),
            "pause_ms": 1e3 * max(swap["last_pause_s"] for swap in swaps),
        }


async def play(decoders: Decoders, config: Config, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rounds of every number of decoders in turns; a row a number."""
    tokenizer = load_tokenizer(resolve(config.target.model, "target"))
    prompts = [
        (domain, tuple(render_chat(tokenizer, [{"role": "user", "content": text}])))
        for texts in zip(*(pocket_prompts(d)[:16] for d in DOMAINS), strict=True)
        for domain, text in zip(DOMAINS, texts, strict=True)
    ]
    load, promotions = Load(prompts, args.tokens), Promotions(config)
    windows: dict[int, list[dict[str, float]]] = {n: [] for n in args.decoders}
    swaps: dict[int, list[dict[str, float]]] = {n: [] for n in args.decoders}
    idle: dict[int, list[dict[str, float]]] = {n: [] for n in args.decoders}
    for number in range(args.rounds):
        for n in args.decoders if number % 2 else args.decoders[::-1]:
            async with load.on(decoders.handles[:n], args.in_flight):
                windows[n].append(await window(decoders, n, args.seconds))
                for _ in range(args.promotions):
                    swaps[n].append(await promotions.fan_out(decoders.handles[:n]))
    for _ in range(args.rounds * args.promotions):
        for n in args.decoders:
            idle[n].append(await promotions.fan_out(decoders.handles[:n]))
    return [
        {
            "decoders": n,
            **{key: _median(w[key] for w in windows[n]) for key in windows[n][0]},
            "times_the_least": _median(
                a["tokens_per_s"] / b["tokens_per_s"]
                for a, b in zip(windows[n], windows[args.decoders[0]], strict=True)
            ),
            "fan_out": summary(swaps[n]),
            "fan_out_idle": summary(idle[n]),
            # Looks are spread evenly: the last of n comes after n / (n + 1) of the interval.
            "fan_out_of_looks_alone_ms": 1e3 * config.checkpoints.poll_s * n / (n + 1),
        }
        for n in args.decoders
    ]


def _median(values: Any) -> float:
    return float(statistics.median(values))


def summary(found: Sequence[dict[str, float]]) -> dict[str, float]:
    return {
        "written_ms": _median(f["written_ms"] for f in found),
        "first_ms": _median(f["first_ms"] for f in found),
        "last_ms": _median(f["last_ms"] for f in found),
        "longest_ms": max(f["last_ms"] for f in found),
        "pause_ms": _median(f["pause_ms"] for f in found),
    }


def measure(nodes: int, args: argparse.Namespace, home: Path) -> tuple[dict[str, Any], Config]:
    """One cluster, from its start to its end."""
    most = max(args.decoders)
    sets = [*args.set, f"state_dir={home}", f"engine.decoders={most}", "ray.placement=SPREAD", "log.level=error"]
    cpus = load(None, sets).ray
    # What both decoders' and learner's shares take, rounded up.
    share = max(1, -(-round(100 * (most * cpus.decoder_cpus + cpus.learner_cpus)) // (100 * nodes)))
    with ray_nodes(nodes, share) as address, redis(args.url, home / "redis") as url:
        config = load(None, [*sets, f"ray.address={address}"])
        started = time.perf_counter()
        cluster = Cluster(config, log_to_driver=False)
        try:
            handles = cluster.decoders(url)
            ray.get([h.start.remote() for h in handles])
            decoders = Decoders(handles)
            start_s = time.perf_counter() - started
            if decoders.nodes != nodes:
                raise SystemExit(f"the decoders are on {decoders.nodes} nodes, not {nodes}")
            rows = asyncio.run(play(decoders, config, args))
            memory = decoders.memory_bytes()
            ray.get([h.flush.remote() for h in handles])
            answered = sum(s["engine"]["finished"] for s in ray.get([h.status.remote() for h in handles]))
            table = open_table(url, config.deployment, **config.buffer.model_dump(exclude={"url"}))
            inserted = table.info().inserted_total
            table.close()
        finally:
            cluster.close()
    about = {"nodes": nodes, "start_s": start_s, "memory_bytes_per_decoder": memory}
    return {**about, "answers": answered, "traces_in_redis": inserted, "rows": rows}, config


def show(row: dict[str, Any]) -> None:
    """Print what one number of decoders gave."""
    own, other = row["decoder_cpu_ms_per_token"], row["other_cpu_ms_per_token"]
    looks = row["fan_out_of_looks_alone_ms"]
    print(
        f"  {row['decoders']} decoders: {row['tokens_per_s']:.0f} tokens/s ({row['times_the_least']:.2f} x); "
        f"processor ms a token: {own:.2f} in decoders, {other:.2f} in all else"
    )
    for name, key in (("under load", "fan_out"), ("idle", "fan_out_idle")):
        written, first, last, longest, pause = (
            row[key][f"{at}_ms"] for at in ("written", "first", "last", "longest", "pause")
        )
        print(
            f"    fan-out {name}, ms: written after {written:.0f}, served by the first after {first:.0f}, by all after "
            f"{last:.0f} (longest {longest:.0f}; waiting for the next look alone {looks:.0f}); pause {pause:.1f}"
        )


def main() -> None:
    """Measure one node and two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decoders", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0, help="of a window")
    parser.add_argument("--promotions", type=int, default=2, help="a round")
    parser.add_argument("--in-flight", type=int, default=4, help="requests at each decoder")
    parser.add_argument("--tokens", type=int, default=64, help="an answer")
    parser.add_argument("--url", help="a running Redis; default: an embedded one")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="over the defaults")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results = []
    for nodes in args.nodes:
        with tempfile.TemporaryDirectory(prefix="adaptd-scale-") as home:
            found, config = measure(nodes, args, Path(home))
        results.append(found)
        print(
            f"\n{nodes} node{'s' * (nodes > 1)}: {max(args.decoders)} decoders up in {found['start_s']:.0f} s, "
            f"{found['memory_bytes_per_decoder'] / 2**20:.0f} MiB each; {found['traces_in_redis']} traces of "
            f"{found['answers']} answers in Redis"
        )
        for row in found["rows"]:
            show(row)
    if args.json:
        write_result(args.json, {"clusters": results}, config)


if __name__ == "__main__":
    main()
