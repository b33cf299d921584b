"""What asking about alternatives costs the requests that come meanwhile, and how many traces get them.

    python benchmarks/idle.py --rounds 5
    python benchmarks/idle.py --set target.model=inflated-0.2b --pause 1.0

One request after the other, a pause of random length behind each answer, through the loop that a decoder actor runs. In
neighbouring rounds the same requests with the same pauses, once with each trace held until the target has been asked about its
alternatives, once without. Printed: median and 90th percentile of the time to the first piece of an answer and to its end,
the ratios of neighbours, and the share of traces that had any of their alternatives.
"""

from __future__ import annotations

import argparse
import queue
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from busy import requests

from adaptd.actors.parts import load_pair
from adaptd.actors.threads import set_threads
from adaptd.cli.common import write_result
from adaptd.config import load
from adaptd.decoding.build import build_loop
from adaptd.decoding.loop import DecodeLoop
from adaptd.decoding.request import DecodeRequest, Delta, Finished
from buffers.trace import Trace

KINDS = ("without", "with alternatives")


@dataclass(frozen=True, slots=True)
class Timed:
    """One round."""

    first_s: list[float]
    """To the first piece of each answer."""
    whole_s: list[float]
    """To its end."""
    asked: float
    """Share of the traces that had any of their alternatives, in the pauses."""

    def figures(self) -> dict[str, float]:
        """Milliseconds, and that share."""
        found = {"asked": self.asked}
        for name, times in (("first", self.first_s), ("whole", self.whole_s)):
            for label, q in (("p50", 50), ("p90", 90)):
                found[f"{name}_{label}_ms"] = 1e3 * float(np.percentile(times, q))
        return found


def one(loop: DecodeLoop, request: DecodeRequest) -> tuple[float, float, Finished]:
    """Seconds to the first piece and to the end of one answer, and the answer."""
    pieces: queue.Queue[Delta | Exception] = queue.Queue()
    started = time.perf_counter()
    loop.submit(request, pieces.put, pieces.put)
    first = None
    while True:
        piece = pieces.get()
        if isinstance(piece, Exception):
            raise piece
        now = time.perf_counter() - started
        first = now if first is None else first
        if piece.finished is not None:
            return first, now, piece.finished


def play(loop: DecodeLoop, some: Sequence[DecodeRequest], pauses: Sequence[float], ask: bool) -> Timed:
    """One round."""
    gone: list[Trace] = []
    times = []
    for request, pause in zip(some, pauses, strict=True):
        first, whole, finished = one(loop, request)
        times.append((first, whole))
        if ask and finished.trace is not None:
            loop.hold(finished.trace, gone.append)
        time.sleep(pause)
    loop.release().result()
    had = sum(len(t.branches.lens) > len(t.rejected_at) for t in gone if t.branches is not None)
    return Timed([f for f, _ in times], [w for _, w in times], had / max(1, len(gone)))


def summarise(rounds: Sequence[tuple[Timed, Timed]]) -> dict[str, Any]:
    """Medians of both kinds of round, and of the ratios of neighbours, with alternatives to without."""
    figures = [(without.figures(), asked.figures()) for without, asked in rounds]
    found: dict[str, Any] = {
        name: {key: statistics.median(pair[at][key] for pair in figures) for key in figures[0][0]}
        for at, name in enumerate(KINDS)
    }
    for key in figures[0][0]:
        if key != "asked":
            ratios = [asked[key] / without[key] for without, asked in figures]
            found[f"{key}_ratio"] = {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}
    return found


def main() -> None:
    """Measure both in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=24, help="a round")
    parser.add_argument("--tokens", type=int, default=48, help="an answer")
    parser.add_argument("--pause", type=float, default=0.2, help="longest, seconds")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="over the defaults")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    config = load(None, ["capture.reserved_share=0", *args.set])
    set_threads(config.engine.threads)
    pair = load_pair(config, 0.0)
    loop = build_loop(config, pair.target, pair.draft.model, pair.tokenizer, "bench")
    some = requests(pair, args.requests, args.tokens)
    pauses = np.random.default_rng(0).uniform(0, args.pause, args.requests).tolist()
    rounds = []
    try:
        play(loop, some, [0.0] * len(some), ask=True)  # what is recalled of these prompts is recalled by both
        for number in range(args.rounds):
            order = (False, True) if number % 2 else (True, False)
            timed = {ask: play(loop, some, pauses, ask) for ask in order}
            rounds.append((timed[False], timed[True]))
    finally:
        loop.close(0.0)
    found = summarise(rounds)
    for name in KINDS:
        values = found[name]
        print(
            f"{name}: first piece {values['first_p50_ms']:.1f} ms (p90 {values['first_p90_ms']:.1f}), whole answer "
            f"{values['whole_p50_ms']:.0f} ms (p90 {values['whole_p90_ms']:.0f}), asked about {values['asked']:.0%}"
        )
    for key, ratio in found.items():
        if key.endswith("_ratio"):
            print(f"{key}: {ratio['median']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]")
    if args.json is not None:
        write_result(args.json, found, config)


if __name__ == "__main__":
    main()
