"""`adaptd bench decode`: alternating timed batches of several decoders, and what the medians say."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from adaptd.bench.contestants import Contestant, Native, Prompts, Sample
from adaptd.bench.metrics import median_interval
from adaptd.decoding.timing import StepTimes
from policies.economics import Costs, expected_speedup

OURS = "adaptd"
BARE = "adaptd, capture off"
PLAIN = "adaptd, no draft"
AUTO = "adaptd, k chosen"
#: Ratio in the result file -> the decoder whose rate is divided by that of which other.
RATIOS = {
    "vs_transformers_assisted": (OURS, "transformers assisted"),
    "vs_transformers_plain": (OURS, "transformers plain"),
    "vs_vllm_cpu": (OURS, "vllm"),
    "speedup": (OURS, PLAIN),
    "vs_capture_off": (OURS, BARE),
    "chosen_speedup": (AUTO, PLAIN),
    "chosen_vs_vllm_cpu": (AUTO, "vllm"),
}
#: Of these a token is a round.
_UNSPECULATED = (PLAIN, "transformers plain")


@dataclass(slots=True)
class Cell:
    """What one batch size and one k gave."""

    batch: int
    k: int
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    times: list[StepTimes] = field(default_factory=list)


def play(
    contestants: Mapping[str, Contestant],
    batches: Sequence[Prompts],
    *,
    k: int,
    rounds: int,
    tokens: int,
    progress: Callable[[], None] = lambda: None,
) -> Cell:
    """Let every decoder continue one batch a round, the same for all, in an order that turns; one round before warms up.

    Args:
      batches: prompts decoded together, all of one number; each round takes the next.
      progress: told after each decoder's turn.
    Returns: one sample a round and decoder.
    """
    cell = Cell(len(batches[0]), k)
    names = list(contestants)
    for number in range(-1, rounds):
        turn = number % len(names)
        prompts = batches[number % len(batches)]
        for name in names[turn:] + names[:turn]:
            sample = contestants[name].run(prompts, tokens)
            if number >= 0:
                cell.samples.setdefault(name, []).append(sample)
            progress()
        ours = contestants.get(OURS)
        if isinstance(ours, Native) and number >= 0 and (times := ours.costs(prompts, tokens)):
            cell.times.append(times)
    return cell


def summarise(cell: Cell, floors: Mapping[str, float]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of the result and the ratios of this cell: the median over rounds of one decoder's rate to another's in that round.

    Args:
      floors: seconds that a round of each decoder takes at least; none where the machine is not the bound.
    Returns: rows, and ratios with their 95 % "intervals", rounds resampled.
    """
    rows = []
    truth = _answers(cell.samples[PLAIN]) if PLAIN in cell.samples else None
    for name, samples in cell.samples.items():
        mal = _mal(samples)
        rate = statistics.median(s.tokens / s.seconds for s in samples)
        row: dict[str, Any] = {
            "engine": name,
            "batch": cell.batch,
            "k": 0 if name in _UNSPECULATED else cell.k,
            "tokens_per_s": rate,
            "rates": [s.tokens / s.seconds for s in samples],
            "mal": mal,
            "floor_ratio": None,
            "same_as_plain": None if truth is None else _same(truth, _answers(samples)),
        }
        if mal is not None and name in floors:
            # A round emits MAL tokens for each row of the batch.
            row["floor_ratio"] = mal * cell.batch / rate / floors[name]
        rows.append(row)
    against = {
        key: _rates(cell.samples[one], cell.samples[other])
        for key, (one, other) in RATIOS.items()
        if one in cell.samples and other in cell.samples
    }
    ratios: dict[str, Any] = {key: statistics.median(against[key]) if key in against else None for key in RATIOS}
    ratios["intervals"] = {key: median_interval(values) for key, values in against.items()}
    ratios["predicted_speedup"] = predicted(cell)
    return rows, ratios


def predicted(cell: Cell) -> float | None:
    """MAL / (1 + k c_d + c_v) with the costs that were timed between the rounds (design section 5)."""
    mal = _mal(cell.samples[OURS])
    if not cell.times or mal is None:
        return None
    costs = Costs(
        draft=statistics.median(t.draft_s / t.target_s for t in cell.times),
        verify=max(0.0, statistics.median(t.verify_s / t.target_s for t in cell.times) - 1.0),
    )
    return expected_speedup(min(max(1.0, mal), cell.k + 1.0), cell.k, costs)


def _mal(samples: Sequence[Sample]) -> float | None:
    rounds = sum(s.rounds for s in samples)
    return sum(s.tokens for s in samples) / rounds if rounds else None


def _answers(samples: Sequence[Sample]) -> list[list[int]]:
    return [answer for sample in samples for answer in sample.answers]


def _same(truth: list[list[int]], answers: list[list[int]]) -> float:
    """Share of the tokens that stand before an answer first differs."""
    same = 0
    for right, said in zip(truth, answers, strict=True):
        same += next((i for i, (a, b) in enumerate(zip(right, said, strict=False)) if a != b), len(right))
    return same / sum(map(len, truth))


def _rates(one: Sequence[Sample], other: Sequence[Sample]) -> list[float]:
    return [(a.tokens / a.seconds) / (b.tokens / b.seconds) for a, b in zip(one, other, strict=True)]
