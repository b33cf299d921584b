"""What recall costs and gives: the same requests decoded with it and without it, in turn, on the pocket pair.

    python benchmarks/recall.py              about three minutes on two cores
    python benchmarks/recall.py --requests 200 --batch 8

Traffic is tools, which the shipped draft has never met; the draft is frozen. Prints MAL, tokens per second, their ratio
over rounds of both, and the bytes of the table.
"""

from __future__ import annotations

import argparse
import statistics
import time

from adaptd.actors.parts import Pair, load_pair
from adaptd.config import load
from adaptd.decoding.build import build_recall, eos_ids
from adaptd.decoding.capture import CaptureConfig
from adaptd.decoding.engine import SpeculativeDecoder
from adaptd.decoding.request import DecodeRequest, SamplingParams
from adaptd.models.chat import render_chat
from adaptd.pocket.shipped import pocket_prompts
from policies.recall import Recall

ROUNDS = 4


def requests(pair: Pair, count: int) -> list[DecodeRequest]:
    """Tools requests, each of at most 64 tokens at temperature 0.8."""
    prompts = pocket_prompts("tools")
    return [
        DecodeRequest(
            request_id=f"{i}",
            prompt_ids=tuple(render_chat(pair.tokenizer, [{"role": "user", "content": prompts[i % len(prompts)]}])),
            params=SamplingParams(temperature=0.8, max_tokens=64, seed=i),
            domain="tools",
        )
        for i in range(count)
    ]


def decode(pair: Pair, some: list[DecodeRequest], batch: int, recall: Recall | None) -> tuple[int, int, float]:
    """Tokens, rounds and seconds."""
    engine = SpeculativeDecoder(
        pair.target,
        pair.draft.model,
        k=4,
        max_batch=batch,
        max_length=512,
        eos_ids=eos_ids(pair.target, pair.tokenizer),
        capture=CaptureConfig(),
        recall=recall,
    )
    waiting, emitted, rounds = some[::-1], 0, 0
    started = time.perf_counter()
    while waiting or engine.active:
        while waiting and engine.can_add():
            engine.add(waiting.pop())
        for delta in engine.step():
            if delta.finished is not None:
                emitted += delta.finished.stats.emitted
                rounds += delta.finished.stats.rounds
    return emitted, rounds, time.perf_counter() - started


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=240)
    parser.add_argument("--batch", type=int, default=8)
    options = parser.parse_args()
    config = load(None, ["recall.seeded=true"])
    pair = load_pair(config, 0.0)
    recall = build_recall(config, "cpu")
    if recall is None:
        raise SystemExit("recall.enabled is false: there is nothing to measure")
    some = requests(pair, options.requests)
    size = len(some) // ROUNDS
    ratios = []
    print(f"{'requests':>12} {'MAL without':>12} {'MAL with':>9} {'tokens/s without':>17} {'with':>6} {'ratio':>6}")
    for start in range(0, ROUNDS * size, size):
        chunk = some[start : start + size]
        plain, mixed = decode(pair, chunk, options.batch, None), decode(pair, chunk, options.batch, recall)
        rates = [tokens / seconds for tokens, _, seconds in (plain, mixed)]
        ratios.append(rates[1] / rates[0])
        print(
            f"{start:>5} .. {start + size - 1:<4} {plain[0] / plain[1]:>11.2f} {mixed[0] / mixed[1]:>9.2f} "
            f"{rates[0]:>17.0f} {rates[1]:>6.0f} {ratios[-1]:>6.2f}"
        )
    print(f"median ratio {statistics.median(ratios):.2f}; {len(recall)} contexts, {recall.nbytes / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
