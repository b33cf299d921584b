"""What reading prompts costs: time to the first token under a shared system prompt, and how long others wait for a long one.

    python benchmarks/prefill.py --rounds 7

The pocket target inflated to `--parameters` (as `adaptd bench decode` makes it), temperature 0. Each round plays both ways
in turns; medians, and ratios of the same round.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

from adaptd.actors.parts import load_pair
from adaptd.actors.threads import set_threads
from adaptd.app.decode import target_folder
from adaptd.config import Config, load
from adaptd.decoding.build import build_engine
from adaptd.decoding.engine import SpeculativeDecoder
from adaptd.decoding.request import DecodeRequest, SamplingParams
from adaptd.pocket.shipped import pocket_prompts

TOKENS = 24


def request(name: str, ids: list[int], tokens: int = TOKENS) -> DecodeRequest:
    """Greedy and of a fixed length."""
    return DecodeRequest(name, ids, SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True))


def first_token_s(engine: SpeculativeDecoder, prompts: list[list[int]]) -> float:
    """Median seconds from a request to its first tokens, one request after the other."""
    found = []
    for at, prompt in enumerate(prompts):
        started = time.perf_counter()
        engine.add(request(str(at), prompt, 2))
        while not engine.step():
            pass
        found.append(time.perf_counter() - started)
        while engine.active:
            engine.step()
    return statistics.median(found[1:])


def longest_gap_s(engine: SpeculativeDecoder, running: list[int], long: list[int]) -> tuple[float, float]:
    """Longest wait between two rounds of a running request while a long prompt is read, and that prompt's first token."""
    engine.add(request("running", running, 200))
    for _ in range(4):
        engine.step()
    engine.add(request("long", long, 1))
    started = at = time.perf_counter()
    gaps: list[float] = []
    while True:
        ended = {delta.request_id for delta in engine.step() if delta.finished is not None}
        gaps.append(time.perf_counter() - at)
        at = time.perf_counter()
        if "long" in ended:
            break
    engine.abort("running")
    return max(gaps), at - started


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--parameters", type=float, default=0.2e9)
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="over the defaults")
    args = parser.parse_args()
    set_threads(os.cpu_count() or 1)
    base = load(None, [*args.set, "engine.max_length=512", "recall.enabled=false"])
    folder = target_folder(base, int(args.parameters), "float32")

    def engine(*sets: str) -> tuple[SpeculativeDecoder, Config]:
        config = load(
            None, [*args.set, "engine.max_length=512", "recall.enabled=false", f"target.model={folder}", *sets]
        )
        pair = load_pair(config, 0)
        return build_engine(config, pair.target, pair.draft.model, pair.tokenizer, capture=False), config

    encode: Callable[[str], list[int]] = load_pair(base, 0).tokenizer.encode
    questions = [encode(text)[:24] for text in pocket_prompts("medical")[: 6 * args.rounds]]
    words = [token for text in pocket_prompts("math") for token in encode(text)]
    system, long = words[:200], words[200:600]
    ways = {"with": engine()[0], "without": engine("engine.prefix_caching=false")[0]}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(args.rounds):
        prompts = [[*system, *q] for q in questions[6 * number : 6 * number + 6]]
        for name in sorted(ways, reverse=bool(number % 2)):
            seconds[name].append(first_token_s(ways[name], prompts))
    shares = [a / b for a, b in zip(seconds["with"], seconds["without"], strict=True)]
    print(f"first token, {len(system)} shared tokens of about {len(system) + 24}:")
    for name, found in seconds.items():
        print(f"  {name} prefix caching {1e3 * statistics.median(found):.0f} ms")
    print(f"  ratio {statistics.median(shares):.2f} ({min(shares):.2f} to {max(shares):.2f})")

    ways = {"bounded": ways["without"], "whole": engine("engine.prefix_caching=false")[0]}
    ways["whole"]._prefill._chunk = lambda others: len(long)  # type: ignore[method-assign]
    gaps: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for number in range(args.rounds):
        for name in sorted(ways, reverse=bool(number % 2)):
            gaps[name].append(longest_gap_s(ways[name], questions[number], long))
    print(
        f"longest wait of a running request while {len(long)} tokens of another are read, and that one's first token:"
    )
    for name, both in gaps.items():
        wait, first = (statistics.median(values) for values in zip(*both, strict=True))
        print(f"  {name} {'chunks' if name == 'bounded' else 'prompts'} {1e3 * wait:.0f} ms, {1e3 * first:.0f} ms")


if __name__ == "__main__":
    main()
