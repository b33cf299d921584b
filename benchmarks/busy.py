"""What a busy learner costs the requests of a decoder: inter-token times and tokens/s with it idle and busy.

    python benchmarks/busy.py --rounds 5
    python benchmarks/busy.py --batch 4 --set target.model=inflated-0.2b --tokens 32

The native engine decodes in this process, as a decoder actor has it (capture, recall, packed weights), on the first core. The
learner takes steps in a process of its own with the threads and the niceness of its actor: on the second core, and then on
the decoder's. Idle, it waits; both are measured in neighbouring rounds on the same requests, each round with an empty recall.
An inter-token time is the time between two pieces of one answer, a piece being what a round gives. Where processes cannot be
bound to cores, the system places them. The share of a processor that the learner had is printed too: far below 100 % on a
core of its own, something else ran there and the figures mean little.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
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


@dataclass(frozen=True, slots=True)
class Timed:
    """One round of requests."""

    tokens: int
    seconds: float
    gaps: list[float]
    """Seconds between two pieces of an answer."""
    steps: int = 0
    """The learner's, meanwhile."""
    learner_s: float = 0.0
    """Its processor time, meanwhile."""

    def figures(self) -> dict[str, float]:
        """Tokens and learner steps a second, inter-token times in milliseconds, processors that the learner had."""
        middle, late = (1e3 * float(np.percentile(self.gaps, q)) for q in (50, 99))
        rate = self.tokens / self.seconds
        return {
            "tokens_per_s": rate,
            "itl_p50_ms": middle,
            "itl_p99_ms": late,
            "steps_per_s": self.steps / self.seconds,
            "learner_share": self.learner_s / self.seconds,
        }


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
        taught.step(batch(*pools, number))
        done.value += 1


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


def measure(config: Config, pair: Pair, some: Sequence[DecodeRequest], taught: Learner, busy: bool) -> Timed:
    """One round, with the learner idle or busy."""
    engine = build_engine(config, pair.target, pair.draft.model, pair.tokenizer, capture=True)
    decode(engine, some[:1])
    if not busy:
        return decode(engine, some)
    with taught.working():
        steps, spent = taught.steps, taught.cpu_s
        found = decode(engine, some)
        return replace(found, steps=taught.steps - steps, learner_s=taught.cpu_s - spent)


def summarise(rounds: Sequence[tuple[Timed, Timed]]) -> dict[str, Any]:
    """Medians of idle and of busy rounds, and of the ratios of neighbours, busy to idle."""
    figures = [(idle.figures(), busy.figures()) for idle, busy in rounds]
    found: dict[str, Any] = {
        name: {key: statistics.median(pair[at][key] for pair in figures) for key in figures[0][0]}
        for at, name in enumerate(("idle", "busy"))
    }
    for key in ("tokens_per_s", "itl_p50_ms", "itl_p99_ms"):
        ratios = [busy[key] / idle[key] for idle, busy in figures]
        found[f"{key}_ratio"] = {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}
    return found


def main() -> None:
    """Measure idle and busy in turns, in both places."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
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
    found: dict[str, list[tuple[Timed, Timed]]] = {place: [] for place in cores}
    try:
        for number in range(args.rounds):
            for place, bound in cores.items():
                if bound is not None:
                    bind(os.getpid(), bound[0])
                    bind(taught.pid, bound[1])
                timed = {b: measure(config, pair, some, taught, b) for b in ((False, True), (True, False))[number % 2]}
                found[place].append((timed[False], timed[True]))
    finally:
        taught.close()
    rows = [{"place": place, **summarise(rounds)} for place, rounds in found.items()]
    for row in rows:
        print(f"\nlearner, {row['place']}: {args.rounds} rounds of {args.requests} requests, batch {args.batch}")
        for key in ("tokens_per_s", "itl_p50_ms", "itl_p99_ms"):
            ratio = row[f"{key}_ratio"]
            print(
                f"  {key:14} idle {row['idle'][key]:8.2f}  busy {row['busy'][key]:8.2f}  "
                f"ratio {ratio['median']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})"
            )
        busy = row["busy"]
        print(f"  learner: {busy['steps_per_s']:.2f} steps/s with {busy['learner_share']:.0%} of a processor")
    if args.json:
        about = {"rounds": args.rounds, "requests": args.requests, "tokens": args.tokens, "batch": args.batch}
        write_result(args.json, {**about, "rows": rows}, config)


if __name__ == "__main__":
    main()
