"""Answer tokens trained on a second: adaptd's learner beside TRL's GKDTrainer, on the same pair, traces and parameters.

    pip install trl==1.16.0 'datasets<5'        not a dependency of adaptd, and wanted by this script alone
    python benchmarks/trainer.py --rounds 5
    python benchmarks/trainer.py --lmbda 0.5 0 1 --set adapt.scope=full

Both take steps of eight captured traces (seven of a domain, one anchor) on the same trainable tensors of the same draft, in
float32 on one thread. GKDTrainer runs the target again over every sequence and compares whole vocabularies; with
probability `lmbda` (its default is 0.5, 0 is without) the draft first writes an answer of its own to the batch's prompts,
which then replaces the captured ones. Gradient checkpointing, its default, is off: memory is not short here. Its steps are
timed inside `train`, behind the first ones of every round. A token counts once a step if its loss is taken.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from step import DOMAINS, MAX_TOKENS, STEPS, TRACES, WARM, answers, batch, learner
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback

from adaptd.actors.parts import load_draft
from adaptd.actors.threads import set_threads
from adaptd.cli.common import write_result
from adaptd.config import Config, load
from adaptd.learning.learner import DraftLearner
from adaptd.models.load import load_causal_lm, load_tokenizer, resolve
from buffers.table import ReplaySample
from buffers.trace import Trace

TRL = "1.16.0"
OURS = "adaptd"


@dataclass(frozen=True, slots=True)
class Timed:
    """Steps of one round."""

    tokens: int
    seconds: float
    generated: int = 0
    """Steps that wrote answers of their own first."""

    @property
    def rate(self) -> float:
        """Trained answer tokens a second."""
        return self.tokens / self.seconds


class Contestant(Protocol):
    """A trainer under test."""

    def run(self, batches: Sequence[list[ReplaySample]]) -> Timed:
        """Take a step on each; the first `WARM` are not timed."""


class Ours:
    """adaptd's learner as its actor runs it: captured target distributions, anchors held, priorities computed."""

    def __init__(self, taught: DraftLearner) -> None:
        self._taught = taught

    def run(self, batches: Sequence[list[ReplaySample]]) -> Timed:
        for samples in batches[:WARM]:
            self._taught.step(samples)
        started = time.perf_counter()
        tokens = sum(self._taught.step(samples).positions for samples in batches[WARM:])
        return Timed(tokens, time.perf_counter() - started)


class _Clock(TrainerCallback):
    """From the beginning of the first timed step to the end of the last: loading of data in between counts, set-up does not."""

    def __init__(self) -> None:
        self.started = self.ended = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == WARM:
            self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.ended = time.perf_counter()


def require_trl() -> None:
    """Raises SystemExit, with the remedy, where trl cannot be imported."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    try:
        import trl.experimental.gkd  # noqa: F401
    except ImportError as error:
        raise SystemExit(f"GKDTrainer cannot be imported ({error}): pip install trl=={TRL}") from None


def row(trace: Trace) -> dict[str, Any]:
    """A trace as TRL's collator takes it, tokens as they were served; it asks for a prompt and does not read it."""
    answer = len(trace.tokens) - trace.prompt_len
    return {
        "prompt": "",
        "input_ids": trace.tokens.tolist(),
        "completion_mask": [0] * trace.prompt_len + [1] * answer,
    }


class Gkd:
    """TRL's trainer; a round is one `train` over the batches, in their order.

    Args:
      draft: the student, with what may change requiring gradients.
      rate: peak learning rate, of AdamW.
    """

    def __init__(
        self,
        draft: PreTrainedModel,
        target: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batches: Sequence[list[ReplaySample]],
        *,
        lmbda: float,
        rate: float,
        max_length: int,
        home: Path,
    ) -> None:
        from datasets import Dataset
        from trl.experimental.gkd import GKDConfig, GKDTrainer

        trained, generated = self._trained, self._generated = [], []

        class Counting(GKDTrainer):
            def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
                trained.append(int((inputs["labels"][:, 1:] != -100).sum()))
                return super().compute_loss(model, inputs, *args, **kwargs)

            def generate_on_policy_outputs(self, *args: Any) -> Any:
                generated.append(len(trained))  # the step whose loss comes next
                return GKDTrainer.generate_on_policy_outputs(*args)

        self._clock = _Clock()
        self._trainer = Counting(
            model=draft,
            teacher_model=target,
            args=GKDConfig(
                lmbda=lmbda,
                learning_rate=rate,
                max_length=max_length,
                max_new_tokens=MAX_TOKENS,
                per_device_train_batch_size=len(batches[0]),
                max_steps=len(batches),
                train_sampling_strategy="sequential",
                gradient_checkpointing=False,
                bf16=False,
                use_cpu=True,
                report_to=[],
                logging_strategy="no",
                save_strategy="no",
                disable_tqdm=True,
                output_dir=str(home),
            ),
            processing_class=tokenizer,
            train_dataset=Dataset.from_list([row(s.trace) for samples in batches for s in samples]),
            callbacks=[self._clock],
        )
        self._trainer.remove_callback(PrinterCallback)

    def run(self, batches: Sequence[list[ReplaySample]]) -> Timed:
        self._trained.clear()
        self._generated.clear()
        self._trainer.train()
        assert len(self._trained) == len(batches), "a step was missed or accumulated"
        generated = sum(step >= WARM for step in self._generated)
        return Timed(sum(self._trained[WARM:]), self._clock.ended - self._clock.started, generated)


def student(config: Config) -> PreTrainedModel:
    """The draft as the learner trains it: with the same frozen and trainable tensors."""
    draft, _ = load_draft(config, "cpu", "float32", serving=False)
    return draft.model


def play(
    contestants: dict[str, Contestant], batches: Sequence[list[ReplaySample]], rounds: int
) -> dict[str, list[Timed]]:
    """All in turns, in an order that turns; a round of each is every batch."""
    found: dict[str, list[Timed]] = {name: [] for name in contestants}
    names = list(contestants)
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            found[name].append(contestants[name].run(batches))
    return found


def summarise(found: dict[str, list[Timed]]) -> list[dict[str, Any]]:
    """Medians over the rounds, and of the ratio of adaptd's rate to each one's in the same round."""
    rows = []
    for name, rounds in found.items():
        ratios = [ours.rate / other.rate for ours, other in zip(found[OURS], rounds, strict=True)]
        rows.append(
            {
                "trainer": name,
                "trained_tokens_per_s": statistics.median(r.rate for r in rounds),
                "rates": [r.rate for r in rounds],
                "generating_steps": sum(r.generated for r in rounds),
                "adaptd_times_faster": statistics.median(ratios),
                "ratios": ratios,
            }
        )
    return rows


def main() -> None:
    """Measure all in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--domain", default="math", choices=DOMAINS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=STEPS, help="timed steps a round")
    parser.add_argument("--lmbda", type=float, nargs="+", default=[0.5, 0.0], help="GKDTrainer's, one contestant each")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="over the defaults")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    require_trl()
    set_threads(1)
    config = load(None, args.set)
    pool = answers(config)
    fresh, anchors = pool.get(args.domain, TRACES), pool.get("medical", TRACES)
    batches = [batch(fresh, anchors, i) for i in range(WARM + args.steps)]
    folder = resolve(config.target.model, "target")
    target = load_causal_lm(folder, dtype="float32", device="cpu")
    with tempfile.TemporaryDirectory() as home:
        contestants: dict[str, Contestant] = {OURS: Ours(learner(args.set, config.learn.prompt_gradient))}
        for lmbda in args.lmbda:
            contestants[f"GKDTrainer, lmbda {lmbda:g}"] = Gkd(
                student(config),
                target,
                load_tokenizer(folder),
                batches,
                lmbda=lmbda,
                rate=config.learn.lr,
                max_length=config.learn.max_tokens,
                home=Path(home),
            )
        rows = summarise(play(contestants, batches, args.rounds))
    print(f"{args.domain}, {args.rounds} rounds of {args.steps} steps, adapt.scope {config.adapt.scope}")
    for r in rows:
        low, high = min(r["rates"]), max(r["rates"])
        print(
            f"{r['trainer']:24} {r['trained_tokens_per_s']:8.0f} trained tokens/s ({low:.0f} to {high:.0f}), "
            f"{r['generating_steps']} of {args.rounds * args.steps} steps generated; "
            f"adaptd is {r['adaptd_times_faster']:.2f} times as fast ({min(r['ratios']):.2f} to {max(r['ratios']):.2f})"
        )
    if args.json:
        about = {"trl": TRL, "domain": args.domain, "rounds": args.rounds, "steps": args.steps}
        write_result(args.json, {**about, "rows": rows}, config)


if __name__ == "__main__":
    main()
