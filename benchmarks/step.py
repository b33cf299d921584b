"""What a step of the learner costs, with the prompt's gradient and without, on the pocket pair.

    python benchmarks/step.py --domain math --rounds 5

Seven traces of the domain and one anchor a step, the default scope, one thread. Prints seconds of processor time a step,
which other work on the machine disturbs little, medians of rounds of ten steps taken in turns, and the loss after them all.
"""

from __future__ import annotations

import argparse
import statistics
import time

from adaptd.actors.parts import draft_learner, load_draft, load_pair
from adaptd.actors.threads import set_threads
from adaptd.bench.answers import AnswerPool
from adaptd.config import Config, load
from adaptd.learning.learner import DraftLearner
from adaptd.pocket.shipped import pocket_prompts
from buffers.table import ReplaySample, SampleInfo, Stratum
from buffers.trace import Trace

STEPS, WARM, TRACES, MAX_TOKENS = 10, 3, 64, 64
DOMAINS = ("medical", "math", "tools", "code")


def learner(sets: list[str], prompt_gradient: bool) -> DraftLearner:
    """A learner at day 0; anchors are held at what the draft is then."""
    config = load(None, [*sets, f"learn.prompt_gradient={str(prompt_gradient).lower()}"])
    draft, _ = load_draft(config, "cpu", "float32", serving=False)
    made = draft_learner(config, draft)
    made.set_reference(draft.state())
    return made


def sample(trace: Trace, stratum: Stratum) -> ReplaySample:
    """As the table would give it."""
    return ReplaySample(SampleInfo(1, 1.0, 1.0, 1, 1, stratum), trace)


def answers(config: Config) -> AnswerPool:
    """The target's answers of at most 64 tokens to the shipped prompts, kept in the deployment's folder."""
    return AnswerPool(
        load_pair(config, 0.0),
        {name: pocket_prompts(name) for name in DOMAINS},
        config.home / "bench",
        temperature=0.8,
        max_tokens=MAX_TOKENS,
        k=config.engine.k,
        k_top=config.capture.k_top,
        max_length=config.engine.max_length,
    )


def batch(fresh: list[Trace], anchors: list[Trace], number: int) -> list[ReplaySample]:
    """What that step learns from: seven traces and one anchor."""
    recent = [sample(fresh[(5 * number + j) % len(fresh)], "recent") for j in range(7)]
    return [*recent, sample(anchors[number % len(anchors)], "anchors")]


def steps(taught: DraftLearner, fresh: list[Trace], anchors: list[Trace], number: int) -> tuple[float, float]:
    """Processor seconds of a step, and the last loss, of `number` of them."""
    started, loss = time.process_time(), 0.0
    for i in range(number):
        loss = taught.step(batch(fresh, anchors, i)).loss
    return (time.process_time() - started) / number, loss


def main() -> None:
    """Measure both in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--domain", default="math", choices=DOMAINS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="over the defaults")
    args = parser.parse_args()
    set_threads(1)
    config = load(None, args.set)
    pool = answers(config)
    fresh, anchors = pool.get(args.domain, TRACES), pool.get("medical", TRACES)
    taught = {on: learner(args.set, on) for on in (True, False)}
    for on in taught:
        steps(taught[on], fresh, anchors, WARM)
    found: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for number in range(args.rounds):
        for on in (True, False) if number % 2 else (False, True):
            found[on].append(steps(taught[on], fresh, anchors, STEPS))
    with_it, without = (statistics.median(s for s, _ in found[on]) for on in (True, False))
    for on, seconds in ((True, with_it), (False, without)):
        name = "through the prompt" if on else "answers alone"
        print(f"{args.domain}, {name}: {seconds:.3f} s a step, loss {found[on][-1][1]:.4f}")
    ratio = statistics.median(b / a for (a, _), (b, _) in zip(found[True], found[False], strict=True))
    print(f"ratio of neighbouring rounds: {ratio:.3f}")


if __name__ == "__main__":
    main()
