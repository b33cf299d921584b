"""Where the time of a round goes: target, draft, recall, capture and the rest, compiled and through Python.

    python benchmarks/round.py --requests 8
    python benchmarks/round.py --parameters 0 --threads 1 --set recall.enabled=true --set engine.dtype=bfloat16

The pocket target inflated to `--parameters` (0: as it is), batch 1, temperature 0, capture on, recall off unless it is set. The
two ways answer the same requests in turns; medians over all rounds, reading prompts not among them. The floor is a part's
weights over the memory's measured bandwidth, or its multiplications over the measured rate of a matrix product. On a GPU
every part waits for the device, so the sum is more than a round takes there.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from busy import requests

from adaptd.actors.parts import Pair, load_pair
from adaptd.actors.threads import set_threads
from adaptd.app.decode import target_folder
from adaptd.bench.floor import floor_s, measure_machine
from adaptd.config import Config, load
from adaptd.decoding.build import build_engine
from adaptd.decoding.engine import SpeculativeDecoder
from adaptd.decoding.request import DecodeRequest

PARTS = ("target", "draft", "recall", "capture", "rest")


class Watch:
    """Seconds of each part of an engine's rounds; what one part calls of another counts there alone.

    Args:
      clock: seconds, with the device's work done.
    """

    def __init__(self, engine: SpeculativeDecoder, clock: Callable[[], float]) -> None:
        self._engine, self._clock = engine, clock
        self._seconds: dict[str, float] = defaultdict(float)
        self._inside: list[float] = []
        for owner, method, part in (
            (engine, "step", "rest"),
            (engine._target, "forward", "target"),
            (engine._drafter, "propose", "draft"),
            (engine._recall, "propose", "recall"),
            (engine._recall, "settle", "recall"),
            (engine._packer, "pack", "capture"),
        ):
            if owner is not None:
                self._wrap(owner, method, part)

    def _wrap(self, owner: Any, method: str, part: str) -> None:
        inner = getattr(owner, method)

        def timed(*args: Any, **options: Any) -> Any:
            started = self._clock()
            self._inside.append(0.0)
            found = inner(*args, **options)
            took = self._clock() - started
            self._seconds[part] += took - self._inside.pop()
            if self._inside:
                self._inside[-1] += took
            return found

        setattr(owner, method, timed)

    def rounds(self, some: Sequence[DecodeRequest]) -> list[dict[str, float]]:
        """The parts of each round that read no prompt, of one request after the other."""
        found = []
        for request in some:
            self._engine.add(request)
            while self._engine.active:
                reads = len(self._engine._prefill) > 0
                self._seconds.clear()
                self._engine.step()
                if not reads:
                    found.append({part: self._seconds[part] for part in PARTS})
        return found


def middle(rounds: Sequence[dict[str, float]]) -> dict[str, float]:
    """Median seconds of each part, and of the whole."""
    parts = {part: statistics.median(r[part] for r in rounds) for part in PARTS}
    return {**parts, "round": statistics.median(sum(r.values()) for r in rounds)}


def floors(config: Config, pair: Pair) -> dict[str, float]:
    """Seconds that the passes take at least, where the machine's rates are those of one CPU process."""
    if pair.target.device.type == "cuda":
        return {}
    machine = measure_machine(pair.target.dtype)
    k = config.engine.k
    found = {
        "target": floor_s(machine, [(pair.target, k + 1)]),
        "draft": floor_s(machine, [(pair.draft.model, 1)] * k),
    }
    return {**found, "round": sum(found.values())}


def main() -> None:
    """Measure both ways and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=0.2e9, help="of the target; 0 leaves it as it is")
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=48, help="an answer")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="over the defaults")
    args = parser.parse_args()
    set_threads(args.threads)
    sets = ["recall.enabled=false", *args.set]
    base = load(None, sets)
    if args.parameters:
        dtype = "float32" if base.engine.dtype == "auto" else base.engine.dtype
        sets = [*sets, f"target.model={target_folder(base, round(args.parameters), dtype)}"]

    def clock() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    least: dict[str, float] = {}
    watches = {}
    for name, on in (("Python", False), ("compiled", True)):
        config = load(None, [*sets, f"engine.compiled={str(on).lower()}"])
        pair = load_pair(config, 0.0)
        least = least or floors(config, pair)
        watches[name] = Watch(build_engine(config, pair.target, pair.draft.model, pair.tokenizer, capture=True), clock)
    some = requests(pair, args.requests, args.tokens)
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in watches}
    for watch in watches.values():
        watch.rounds(some[:1])
    for at, request in enumerate(some):
        for name in sorted(watches, reverse=bool(at % 2)):
            rounds[name] += watches[name].rounds([request])
    found = {name: middle(taken) for name, taken in rounds.items()}
    print(f"milliseconds a round, {', '.join(f'{len(taken)} {name}' for name, taken in rounds.items())}")
    print(f"{'part':10}" + "".join(f"{name:>10}" for name in [*found, "floor"]))
    for part in (*PARTS, "round"):
        values = [*(f"{1e3 * parts[part]:10.2f}" for parts in found.values())]
        print(f"{part:10}" + "".join(values) + (f"{1e3 * least[part]:10.2f}" if part in least else ""))


if __name__ == "__main__":
    main()
