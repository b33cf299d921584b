"""Fixed draft lengths against the chosen one: the same prompts, decoded in turns, at the cost of a large target.

    python benchmarks/depth.py                     k 1 to 8, medical and tools, about half an hour on two cores
    python benchmarks/depth.py --prompts 4,2 --depths 1,2,4,8

The target is the pocket one inflated to 0.2 billion parameters, written once to the deployment's folder. The draft knows
medical traffic and has never met tools. Every prompt is continued by every decoder before the next one, in an order that
turns; decoding is greedy, so all have the same tokens to find. The decoder that chooses serves both domains alternately
and first has some prompts of each to itself (`--warm`). Prints tokens a second, MAL, the mean k of what is proposed, and
the chosen one's rate over that of the best fixed k. Interrupted, it prints what it has.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from adaptd.actors.parts import load_pair
from adaptd.actors.threads import set_threads
from adaptd.app.decode import target_folder
from adaptd.bench.contestants import NativePlain
from adaptd.config import load
from adaptd.decoding.build import build_engine
from adaptd.decoding.engine import SpeculativeDecoder
from adaptd.decoding.request import DecodeRequest, Finished, SamplingParams
from adaptd.models.chat import render_chat
from adaptd.pocket.shipped import pocket_prompts
from policies.draft_length import DraftLength

DOMAINS = ("medical", "tools")
AUTO, PLAIN = "auto", "no draft"


@dataclass(slots=True)
class Sums:
    """What one decoder did on one domain."""

    seconds: float = 0.0
    emitted: int = 0
    rounds: int = 0
    proposed: int = 0

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.emitted / self.seconds


def answer(engine: SpeculativeDecoder, ids: list[int], domain: str, tokens: int) -> Finished:
    """One request from beginning to end."""
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    engine.add(DecodeRequest("r", ids, params, domain=domain))
    while True:
        for delta in engine.step():
            if delta.finished is not None:
                return delta.finished


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--depths", default="1,2,3,4,5,6,7,8", help="fixed k, the largest is also the chosen one's limit"
    )
    parser.add_argument("--prompts", default="24,12", help="medical and tools; these take three times as long")
    parser.add_argument("--warm", type=int, default=12, help="of each domain, for the decoder that chooses")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--parameters", type=int, default=200_000_000, help="of the target; 0: as it is")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="over the defaults")
    options = parser.parse_args()
    depths = [int(k) for k in options.depths.split(",")]
    set_threads(options.threads)
    config = load(None, ["recall.enabled=false", "engine.max_batch=1", f"engine.k={max(depths)}", *options.set])
    model = target_folder(config, options.parameters or None, "float32")
    config = config.model_copy(update={"target": config.target.model_copy(update={"model": model})})
    pair = load_pair(config, 0.0)
    policy = DraftLength(max(depths))
    engines: dict[str, SpeculativeDecoder] = {}
    # The first one packs the target, for as many positions as any of them verifies.
    for name, k in [(AUTO, max(depths)), *((f"k = {k}", k) for k in depths)]:
        settings = config.model_copy(update={"engine": config.engine.model_copy(update={"k": k})})
        chosen = policy if name == AUTO else None
        made = build_engine(settings, pair.target, pair.draft.model, pair.tokenizer, capture=True, draft_length=chosen)
        engines[name] = made
    plain = NativePlain(pair.target, batch=1, max_length=config.engine.max_length)
    prompts = {
        domain: [render_chat(pair.tokenizer, [{"role": "user", "content": text}]) for text in pocket_prompts(domain)]
        for domain in DOMAINS
    }
    for at, domain in itertools.product(range(options.warm), DOMAINS):
        answer(engines[AUTO], prompts[domain][-1 - at], domain, options.tokens)
    for engine in engines.values():
        answer(engine, prompts["medical"][-1], "medical", 8)

    found: dict[str, dict[str, Sums]] = {domain: {} for domain in DOMAINS}
    names = [*engines, PLAIN]
    counts = dict(zip(DOMAINS, map(int, options.prompts.split(",")), strict=True))
    with contextlib.suppress(KeyboardInterrupt):
        for at, domain in itertools.product(range(max(counts.values())), DOMAINS):
            if at >= counts[domain]:
                continue
            ids, turn, answers = prompts[domain][at], at % len(names), set()
            for name in names[turn:] + names[:turn]:
                sums = found[domain].setdefault(name, Sums())
                play(engines.get(name), plain, ids, domain, options.tokens, sums, answers)
            if len(answers) > 1:
                print(f"{domain} prompt {at}: the decoders disagree on the most likely token somewhere")
    for domain in (domain for domain in DOMAINS if len(found[domain]) == len(names)):
        show(domain, found[domain], [f"k = {k}" for k in depths])
    print(f"chosen at the end: {policy.chosen}; {policy.trials} trial rounds; acceptance by depth:")
    for domain in DOMAINS:
        print(f"  {domain}: {' '.join(f'{rate:.2f}' for rate in policy.accept_at(domain))}")
    print(f"price of a round of k = 0 to {max(depths)}: {' '.join(f'{price:.2f}' for price in policy.costs.ratios(1))}")
    if options.json:
        rows = {
            domain: {name: {**asdict(sums), "tokens_per_s": sums.rate} for name, sums in found[domain].items()}
            for domain in DOMAINS
        }
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


def play(
    engine: SpeculativeDecoder | None,
    plain: NativePlain,
    ids: list[int],
    domain: str,
    tokens: int,
    sums: Sums,
    answers: set[tuple[int, ...]],
) -> None:
    """One prompt by one decoder, timed."""
    started = time.perf_counter()
    if engine is None:
        sample = plain.run([ids], tokens)
        emitted, rounds, proposed = sample.answers[0], tokens, 0
    else:
        done = answer(engine, ids, domain, tokens)
        emitted, rounds, proposed = list(done.token_ids), done.stats.rounds, done.stats.proposed
    sums.seconds += time.perf_counter() - started
    sums.emitted += len(emitted)
    sums.rounds += rounds
    sums.proposed += proposed
    answers.add(tuple(emitted))


def show(domain: str, found: dict[str, Sums], fixed: list[str]) -> None:
    """A table, and the ratio."""
    print(f"{domain:>10} {'tokens/s':>9} {'MAL':>6} {'mean k':>7}")
    for name in (*fixed, PLAIN, AUTO):
        s = found[name]
        print(f"{name:>10} {s.rate:>9.2f} {s.emitted / s.rounds:>6.2f} {s.proposed / s.rounds:>7.2f}")
    best = max(fixed, key=lambda name: found[name].rate)
    ratio, bare = found[AUTO].rate / found[best].rate, found[AUTO].rate / found[PLAIN].rate
    print(f"{domain}: {AUTO} is at {ratio:.3f} of the best fixed ({best}), {bare:.3f} of no draft")


if __name__ == "__main__":
    main()
