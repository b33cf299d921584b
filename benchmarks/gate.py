"""The gate's confusion table: 200 decisions on bad candidates, 200 on good ones, on the pocket pair.

    python benchmarks/gate.py                answers are cached in the state directory
    python benchmarks/gate.py --json FILE

Traffic has moved from medical to math. Good candidates learned math as adaptd does, with anchors, and are taken at several
points between day 0 and what was learned; the last point itself gains most and loses more on medical than
`gate.max_regression` allows, and has a row of its own. Bad ones: noise; over-fitted to three traces of one domain; trained
on labels of other positions; NaN; learned on another base draft; learned from recent traffic alone, without anchors, at
three times the rate. Each decision sees its own random choice of recent reserved traces (math) and guards (all domains).
A candidate counts as what it is by name; the table also says what is true of it on all judged traces: the mean gain, and
that of the domain that gains least, in the candidate of its kind where that is least.

Each decision is taken three times: of a draft that serves every request alike (`plain`, what other engines load), of the
same where nobody asks medical and tools any more (`gone`: they may fall by `gate.gone_loss`), and of one that leaves to the
day-0 draft what that serves better (`gated`). There a candidate that helps math and ruins the rest does no harm, and may be
promoted; `served` columns are what it then gains.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adaptd.actors.parts import load_draft, load_pair
from adaptd.bench.answers import AnswerPool
from adaptd.config import Config, load
from adaptd.learning.evaluate import profiles
from adaptd.learning.learner import DraftLearner
from adaptd.models.scope import AdaptedDraft
from adaptd.pocket.shipped import pocket_prompts
from buffers.table import ReplaySample, SampleInfo
from buffers.trace import Trace
from policies.floor import better_on_floor, served
from policies.gate import GAIN_STRATUM, Score, judge

State = dict[str, Tensor]
#: What is true of a kind of candidates, over those that there are.
TRUTHS: Mapping[str, Callable[[Sequence[float]], Any]] = {
    "gain_plain": np.mean,
    "worst_plain": np.min,
    "gain_served": np.mean,
    "worst_served": np.min,
}
WAYS = ("plain", "gone", "gated")
DRAWS, RECENT, GUARDS = 5, 32, 64
LEARNED = {"math": 120, "medical": 80, "tools": 24}
JUDGED = {"math": 100, "medical": 80, "tools": 40}


def sample(trace: Trace, stratum: str = "recent") -> ReplaySample:
    """A trace as the learner takes it."""
    return ReplaySample(SampleInfo(1, 1.0, 1.0, 1, 1, stratum), trace)  # type: ignore[arg-type]


class Bench:
    """The pair, the traces to learn from and those to judge on."""

    def __init__(self, config: Config) -> None:
        self.config = config
        pool = AnswerPool(
            load_pair(config, 0.0),
            {d: pocket_prompts(d) for d in LEARNED},
            config.home / "bench",
            temperature=0.8,
            max_tokens=64,
            k=config.engine.k,
            k_top=config.capture.k_top,
            max_length=config.engine.max_length,
        )
        answers = {d: pool.get(d, LEARNED[d] + JUDGED[d]) for d in LEARNED}
        self.learned = {d: answers[d][: LEARNED[d]] for d in LEARNED}
        self.judged = [t for d in JUDGED for t in answers[d][LEARNED[d] :]]
        self.draft, _ = load_draft(config, "cpu", "float32", serving=False)
        self.day0 = self.scores({})

    def scores(self, state: Mapping[str, Tensor]) -> list[tuple[float, float]]:
        """(emitted, rounds) of every judged trace. Raises ValueError for a draft whose logits are not finite."""
        self.draft.load(state)
        found = profiles(self.draft.model, self.judged, self.config.engine.k, max_tokens=384)
        return [(p.emitted, p.rounds) for p in found]

    def train(
        self,
        traces: Sequence[Trace],
        seed: int,
        steps: int,
        *,
        lr: float,
        anchors: bool,
        draft: AdaptedDraft | None = None,
    ) -> State:
        """Learned tensors after `steps` of 8 traces, three of them anchors if asked."""
        draft = self.draft if draft is None else draft
        draft.load({})
        learner = DraftLearner(draft, objective="kl_tv", lr=lr, warmup_steps=5)
        learner.set_reference({} if anchors else None)
        rng = np.random.default_rng(seed)
        for _ in range(steps):
            chosen = [sample(traces[i]) for i in rng.integers(len(traces), size=5 if anchors else 8)]
            if anchors:
                held = self.learned["medical"]
                chosen += [sample(held[i], "anchors") for i in rng.integers(len(held), size=3)]
            learner.step(chosen)
        return learner.average()

    def decide(self, candidate: list[tuple[float, float]], rng: np.random.Generator) -> dict[str, bool]:
        """One decision of the gate in each of the `WAYS`, day 0 being incumbent and floor, on a random choice of traces."""
        math = [i for i, t in enumerate(self.judged) if t.domain == "math"]
        recent = rng.choice(math, RECENT, replace=False)
        others = np.setdiff1d(np.arange(len(self.judged)), recent)
        guards = rng.choice(others, GUARDS, replace=False)
        rows = [(int(i), GAIN_STRATUM) for i in recent] + [(int(i), "guard") for i in guards]

        def chosen(scores: list[tuple[float, float]]) -> list[Score]:
            return [Score(self.judged[i].domain, stratum, *scores[i]) for i, stratum in rows]

        gate, opened, floor = self.config.gate, chosen(candidate), chosen(self.day0)

        def promoted(scores: list[Score], gone: Collection[str] = ()) -> bool:
            return judge(
                scores,
                floor,
                min_gain=gate.min_gain,
                max_regression=gate.max_regression,
                min_traces=gate.min_traces,
                rng=rng,
                floor=floor,
                exchange=gate.exchange,
                gone=gone,
                gone_loss=gate.gone_loss,
            ).promote

        kept = better_on_floor(opened, floor, (), min_traces=gate.min_traces)
        return {
            "plain": promoted(opened),
            "gone": promoted(opened, JUDGED.keys() - {"math"}),
            "gated": promoted(served(opened, floor, kept)),
        }

    def gains(self, candidate: list[tuple[float, float]]) -> dict[str, float]:
        """Relative gain in MAL over day 0 on all judged traces and in the domain that gains least, plain and gated."""
        opened, floor = (
            [Score(t.domain, "all", *s) for t, s in zip(self.judged, scores, strict=True)]
            for scores in (candidate, self.day0)
        )
        kept = better_on_floor(opened, floor, (), min_traces=1)
        found = {}
        for name, scores in (("plain", opened), ("served", served(opened, floor, kept))):
            found[f"gain_{name}"] = _mal(scores) / _mal(floor) - 1
            found[f"worst_{name}"] = min(
                _mal([s for s in scores if s.domain == d]) / _mal([s for s in floor if s.domain == d]) - 1
                for d in JUDGED
            )
        return found


def scaled(state: State, day0: State, share: float) -> State:
    """The point `share` of the way from day 0 to a learned state."""
    return {name: day0[name].lerp(tensor, share) for name, tensor in state.items()}


def good(bench: Bench, day0: State) -> Iterator[tuple[str, State]]:
    """40 candidates, and 10 that go too far."""
    for seed in range(10):
        learned = bench.train(bench.learned["math"], seed, 40, lr=3e-3, anchors=True)
        for share in (0.4, 0.5, 0.6, 0.7):
            yield "good", scaled(learned, day0, share)
        yield "too far", learned


def bad(bench: Bench, day0: State) -> Iterator[tuple[str, State]]:
    """40 candidates of six kinds."""
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        noise = {n: torch.randn(t.shape, generator=generator) * 0.01 * (1 + seed) for n, t in day0.items()}
        yield "noise", {n: t + noise[n] for n, t in day0.items()}
        few = bench.learned["tools"][3 * seed : 3 * seed + 3]
        yield "over-fitted", bench.train(few, seed, 30, lr=1e-2, anchors=False)
        yield "shuffled labels", bench.train(shuffled(bench.learned["math"], seed), seed, 20, lr=3e-3, anchors=True)
        yield "no anchors", bench.train(bench.learned["math"], seed, 40, lr=1e-2, anchors=False)
    for seed in range(4):
        broken = {n: t.clone() for n, t in day0.items()}
        next(iter(broken.values())).view(-1)[seed] = torch.nan
        yield "NaN", broken
        yield "stale base", stale(bench, seed)


def shuffled(traces: Sequence[Trace], seed: int) -> list[Trace]:
    """The target's distributions at permuted positions."""
    rng = np.random.default_rng(seed)
    found = []
    for trace in traces:
        order = rng.permutation(len(trace.topk_ids))
        found.append(
            dataclasses.replace(trace, topk_ids=trace.topk_ids[order], topk_logprobs=trace.topk_logprobs[order])
        )
    return found


def stale(bench: Bench, seed: int) -> State:
    """Learned on a base draft whose weights are others."""
    other, _ = load_draft(bench.config, "cpu", "float32", serving=False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in other.base_state().values():
            tensor += 0.3 * tensor.std() * torch.randn(tensor.shape, generator=generator)
    return bench.train(bench.learned["math"], seed, 40, lr=3e-3, anchors=False, draft=other)


def measure(bench: Bench, make: Callable[[Bench, State], Iterator[tuple[str, State]]], seed: int) -> dict[str, Any]:
    """Decisions and true gains by kind."""
    bench.draft.load({})
    day0 = bench.draft.state()
    found: dict[str, dict[str, Any]] = {}
    rng = np.random.default_rng(seed)
    for kind, state in make(bench, day0):
        row = found.setdefault(kind, {"decided": 0, **dict.fromkeys(WAYS, 0), **{name: [] for name in TRUTHS}})
        try:
            scores = bench.scores(state)
        except ValueError:
            # Not finite: `LearnerCycle` refuses it before it asks the gate.
            row["decided"] += DRAWS
            continue
        for _ in range(DRAWS):
            row["decided"] += 1
            for way, promoted in bench.decide(scores, rng).items():
                row[way] += promoted
        for name, value in bench.gains(scores).items():
            row[name].append(value)
        print(kind, {k: v for k, v in row.items() if isinstance(v, int)}, flush=True)
    for row in found.values():
        for name, summary in TRUTHS.items():
            row[name] = float(summary(row[name])) if row[name] else None
    return found


def _mal(scores: Sequence[Score]) -> float:
    return sum(s.emitted for s in scores) / sum(s.rounds for s in scores)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--state-dir", type=Path, default=Path(tempfile.gettempdir()) / "adaptd-bench")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as of `adaptd`")
    options = parser.parse_args()
    bench = Bench(load(None, [f"state_dir={options.state_dir}", "adapt.request_gate=false", *options.set]))
    table = measure(bench, bad, 0) | measure(bench, good, 1)
    ways = "".join(f" {way:>6}" for way in WAYS)
    print(f"\n{'candidate':16} {'decisions':>9}{ways}" + "".join(f" {n:>13}" for n in TRUTHS))
    for kind, row in table.items():
        truths = "".join(f" {'-' if row[n] is None else f'{row[n]:+.1%}':>13}" for n in TRUTHS)
        counts = "".join(f" {row[way]:>6}" for way in WAYS)
        print(f"{kind:16} {row['decided']:>9}{counts}{truths}")
    if options.json:
        options.json.write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    main()
