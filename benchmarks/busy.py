"""What a busy learner costs the requests of a decoder: inter-token times and tokens/s with it idle and busy.

    python benchmarks/busy.py --rounds 5
    python benchmarks/busy.py --rounds 12 --requests 4 --tokens 48 --set target.model=inflated-0.2b

The native engine decodes in this process, as a decoder actor has it (capture, recall, packed weights), on the first core. The
learner takes steps in a process of its own with the threads, the niceness and the duty cycle of its actor: on the second core,
and then on the decoder's. Idle, it waits. As many requests as there is room for are answered three times with an empty recall,
idle, busy, idle: busy is compared with both its neighbours, which takes out that a machine grows slower or faster, and the
second idle time with the first, which tells what the machine does by itself. Intervals are at 95 %, requests resampled.

An inter-token time is the time between two pieces of one answer, a piece being what a round gives. Where processes cannot be
bound to cores, the system places them. The share of a processor that the learner had is printed too: far below its duty cycle
on a core of its own, something else ran there and the figures mean little.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count, product
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from step import DOMAINS, TRACES, answers, batch, learner

from adaptd.actors.parts import Pair, load_pair
from adaptd.actors.threads import set_threads
from adaptd.bench.answers import read_answers
from adaptd.cli.common import write_result
from adaptd.config import Config, load
from adaptd.decoding.build import build_engine
from adaptd.decoding.engine import SpeculativeDecoder
from adaptd.decoding.request import DecodeRequest, SamplingParams
from adaptd.models.chat import render_chat
from adaptd.pocket.shipped import pocket_prompts

RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Timed:
    """Requests answered together."""

    tokens: int
    seconds: float
    gaps: list[float]
    """Seconds between two pieces of an answer."""
    steps: int = 0
    """The learner's, meanwhile."""
    learner_s: float = 0.0
    """Its processor time, meanwhile."""

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds


Unit = tuple[Timed, Timed, Timed]
"""The same requests idle, busy, idle."""


def study(sets: list[str], fresh: Path, anchors: Path, busy: Any, resting: Any, done: Any) -> None:
    """The learner's process: steps while it is told to be busy."""
    config = load(None, sets)
    set_threads(config.learn.threads, config.learn.niceness)
    taught = learner(sets, config.learn.prompt_gradient)
    pools = read_answers(fresh, TRACES), read_answers(anchors, TRACES)
    for number in count():
        if not busy.is_set():
            resting.set()
            busy.wait()
            resting.clear()
        taken = taught.step(batch(*pools, number))
        done.value += 1
        time.sleep(taken.seconds * (1.0 / config.learn.duty_cycle - 1.0))


class Learner:
    """That process as the measurement sees it."""

    def __init__(self, sets: list[str], fresh: Path, anchors: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._busy, self._resting, self._done = context.Event(), context.Event(), context.Value("l", 0)
        self._process = context.Process(
            target=study, args=(sets, fresh, anchors, self._busy, self._resting, self._done), daemon=True
        )
        self._process.start()
        with self.working():  # a first step warms it up
            pass

    @property
    def pid(self) -> int:
        """Of the process."""
        return int(self._process.pid or 0)

    @property
    def cpu_s(self) -> float:
        """Processor time so far."""
        times = psutil.Process(self.pid).cpu_times()
        return float(times.user + times.system)

    @property
    def steps(self) -> int:
        """Taken so far."""
        return int(self._done.value)

    @contextmanager
    def working(self) -> Iterator[None]:
        """Busy inside, with a step behind it; waiting again afterwards."""
        before = self.steps
        self._busy.set()
        while self.steps == before:
            if not self._process.is_alive():
                raise SystemExit("the learner's process ended: its error is printed above")
            time.sleep(0.01)
        try:
            yield
        finally:
            self._busy.clear()
            self._resting.wait()

    def close(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.join()


def bind(pid: int, core: int) -> None:
    """Every thread of a process to one core."""
    for thread in os.listdir(f"/proc/{pid}/task"):
        os.sched_setaffinity(int(thread), {core})


def places() -> dict[str, tuple[int, int] | None]:
    """Core of the decoder and of the learner; None leaves both to the system."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if len(cores) < 2:
        return {"placed by the system": None}
    return {"own core": (cores[0], cores[1]), "same core": (cores[0], cores[0])}


def requests(pair: Pair, number: int, tokens: int) -> list[DecodeRequest]:
    """Of all domains in turn, greedy and of one length: a round's work does not depend on chance."""
    texts = {domain: pocket_prompts(domain) for domain in DOMAINS}
    found = []
    for i in range(number):
        domain = DOMAINS[i % len(DOMAINS)]
        text = texts[domain][i // len(DOMAINS) % len(texts[domain])]
        ids = render_chat(pair.tokenizer, [{"role": "user", "content": text}])
        params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        found.append(DecodeRequest(str(i), tuple(ids), params, domain=domain))
    return found


def decode(engine: SpeculativeDecoder, some: Sequence[DecodeRequest]) -> Timed:
    """Serve them, as many at once as the engine takes."""
    waiting, tokens, gaps = list(some[::-1]), 0, []
    last: dict[str, float] = {}
    started = time.perf_counter()
    while waiting or engine.active:
        while waiting and engine.can_add():
            engine.add(waiting.pop())
        deltas = engine.step()
        now = time.perf_counter()
        for delta in deltas:
            tokens += len(delta.token_ids)
            if delta.request_id in last:
                gaps.append(now - last[delta.request_id])
            last[delta.request_id] = now
    return Timed(tokens, time.perf_counter() - started, gaps)


def measure(config: Config, pair: Pair, some: Sequence[DecodeRequest], taught: Learner) -> Unit:
    """The same requests with the learner idle, busy and idle again."""

    def fresh() -> SpeculativeDecoder:
        return build_engine(config, pair.target, pair.draft.model, pair.tokenizer, capture=True)

    before = decode(fresh(), some)
    engine = fresh()
    with taught.working():
        steps, spent = taught.steps, taught.cpu_s
        busy = decode(engine, some)
        busy = replace(busy, steps=taught.steps - steps, learner_s=taught.cpu_s - spent)
    return before, busy, decode(fresh(), some)


def cost(units: Sequence[Unit]) -> dict[str, float]:
    """Busy against idle: median ratios of tokens/s, ratios of the percentiles of all inter-token times."""
    found = {
        "tokens_per_s": statistics.median(b.rate / math.sqrt(a.rate * c.rate) for a, b, c in units),
        "idle_tokens_per_s": statistics.median(c.rate / a.rate for a, _, c in units),
    }
    idle, busy = ([gap for some in times for gap in some] for times in gaps(units))
    for q in (50, 99):
        found[f"itl_p{q}_ms"] = float(np.percentile(busy, q) / np.percentile(idle, q))
    return found


def gaps(units: Sequence[Unit]) -> tuple[list[list[float]], list[list[float]]]:
    """Inter-token times, idle and busy, unit by unit."""
    return [a.gaps + c.gaps for a, _, c in units], [b.gaps for _, b, _ in units]


def summarise(units: Sequence[Unit]) -> dict[str, Any]:
    """What idle and busy requests got, and the ratios with their intervals."""
    idle, busy = ([x for some in times for x in some] for times in gaps(units))
    seconds = sum(b.seconds for _, b, _ in units)
    rng = np.random.default_rng(0)
    drawn = [cost([units[i] for i in rng.integers(len(units), size=len(units))]) for _ in range(RESAMPLES)]
    return {
        "units": len(units),
        "idle": {"tokens_per_s": statistics.median(x.rate for a, _, c in units for x in (a, c)), **percentiles(idle)},
        "busy": {"tokens_per_s": statistics.median(b.rate for _, b, _ in units), **percentiles(busy)},
        "ratio": {
            key: {
                "ratio": value,
                "low": float(np.quantile([d[key] for d in drawn], 0.025)),
                "high": float(np.quantile([d[key] for d in drawn], 0.975)),
            }
            for key, value in cost(units).items()
        },
        "steps_per_s": sum(b.steps for _, b, _ in units) / seconds,
        "learner_share": sum(b.learner_s for _, b, _ in units) / seconds,
    }


def percentiles(times: Sequence[float]) -> dict[str, float]:
    """Of inter-token times in seconds: the median and the 99th, in milliseconds."""
    return {f"itl_p{q}_ms": 1e3 * float(np.percentile(times, q)) for q in (50, 99)}


def main() -> None:
    """Measure idle and busy in turns, in both places."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="over all requests")
    parser.add_argument("--requests", type=int, default=8, help="a round")
    parser.add_argument("--tokens", type=int, default=64, help="an answer")
    parser.add_argument("--batch", type=int, default=1, help="requests at once")
    parser.add_argument("--domain", default="math", choices=DOMAINS, help="what the learner learns")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="over the defaults")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    config = load(None, [*args.set, f"engine.max_batch={args.batch}"])
    set_threads(config.engine.threads)
    pool = answers(config)
    taught = Learner(args.set, pool.fill(args.domain, TRACES), pool.fill("medical", TRACES))
    pair = load_pair(config, 0.0)
    some = requests(pair, args.requests, args.tokens)
    cores = places()
    found: dict[str, list[Unit]] = {place: [] for place in cores}
    decode(build_engine(config, pair.target, pair.draft.model, pair.tokenizer, capture=True), some[:1])
    try:
        for _, at, (place, bound) in product(range(args.rounds), range(0, len(some), args.batch), cores.items()):
            if bound is not None:
                bind(os.getpid(), bound[0])
                bind(taught.pid, bound[1])
            found[place].append(measure(config, pair, some[at : at + args.batch], taught))
    finally:
        taught.close()
    rows = [{"place": place, **summarise(units)} for place, units in found.items()]
    for row in rows:
        show(row, args)
    if args.json:
        about = {"rounds": args.rounds, "requests": args.requests, "tokens": args.tokens, "batch": args.batch}
        write_result(args.json, {**about, "rows": rows}, config)


def show(row: dict[str, Any], args: argparse.Namespace) -> None:
    """One place."""
    print(f"\nlearner, {row['place']}: {row['units']} times three answers of {args.tokens} tokens, batch {args.batch}")
    for key, value in row["busy"].items():
        ratio = row["ratio"][key]
        print(
            f"  {key:14} idle {row['idle'][key]:8.2f}  busy {value:8.2f}  "
            f"ratio {ratio['ratio']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]"
        )
    alone = row["ratio"]["idle_tokens_per_s"]
    print(f"  idle again: ratio of tokens_per_s {alone['ratio']:.3f} [{alone['low']:.3f}, {alone['high']:.3f}]")
    print(f"  learner: {row['steps_per_s']:.2f} steps/s with {row['learner_share']:.0%} of a processor")


if __name__ == "__main__":
    main()
