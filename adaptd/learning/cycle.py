"""One tick of adaptation: sample traces, take steps, ask the gate, publish.

Invariants: reserved traces are read by the gate and by nothing else; the store is written only after a verdict to
promote, and only on top of the version that the learner stands at; after any failure it stands at a published version or
at day 0.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from adaptd import events
from adaptd.config import GateConfig, LearnConfig
from adaptd.learning import quarantine
from adaptd.learning.batches import Batches
from adaptd.learning.evaluate import Rule
from adaptd.learning.jury import Jury, Ruling
from adaptd.learning.learner import DraftLearner
from adaptd.log import logger
from buffers.table import ReplayTable
from checkpoints.errors import Superseded
from checkpoints.manifest import Manifest
from checkpoints.store import CheckpointStore

_log = logger(__name__)

#: What a loss on old traffic does to the anchors' share of a batch, what a promotion takes back, and its bounds: the
#: share follows the gate as a multiplier follows its constraint (dual ascent, Boyd and Vandenberghe 2004, chapter 5).
HOLD_UP, HOLD_DOWN, HOLD_MAX = 1.5, 0.9, 6.0

#: Gain below which a refused candidate says that there is nothing to learn at present: the next tick takes half as many
#: steps, down to `LEAST_EFFORT` of them, until a candidate is promoted again, a domain loses or traffic drifts.
IDLE_GAIN, LEAST_EFFORT = 0.002, 0.25

#: In the saved state: the version on which it rests.
_STOOD_AT = "stood_at"

#: Steps whose loss was not finite, in a row, after which learning goes back to the last published version.
MAX_SKIPPED = 3


@dataclass(frozen=True, slots=True)
class Identity:
    """What a checkpoint must match: base draft, tokenizer, scope; and the configuration it is made under."""

    base_id: str
    tokenizer_hash: str
    scope: str
    scope_config: dict[str, Any]
    config: dict[str, Any]


@dataclass(slots=True)
class TickReport:
    """One line per tick, for the log and `adaptd status`."""

    reason: str
    steps: int = 0
    loss: float | None = None
    tokens: int = 0
    seconds: float = 0.0
    skipped_steps: int = 0
    published: int | None = None
    verdict: dict[str, Any] | None = None
    at: float = 0.0


class LearnerCycle:
    """Owns the training draft's progress against one replay table and one checkpoint store.

    Args:
      k: tokens proposed a round by the decoders: the gate scores at this depth.
      clock: seconds since the epoch.
      pause: waits so many seconds.
      rule: how the engine that serves accepts; the gate scores by it.
    """

    def __init__(
        self,
        table: ReplayTable,
        store: CheckpointStore,
        learner: DraftLearner,
        identity: Identity,
        *,
        learn: LearnConfig,
        gate: GateConfig,
        k: int,
        state_file: Path,
        rng: np.random.Generator,
        clock: Callable[[], float] = time.time,
        pause: Callable[[float], None] = time.sleep,
        rule: Rule = "rejection",
    ) -> None:
        self._table, self._store, self._learner, self._identity = table, store, learner, identity
        self._learn = learn
        self._state_file, self._rng, self._clock, self._pause = state_file, rng, clock, pause
        self._jury = Jury(table, learner, gate, k=k, max_tokens=learn.max_tokens, rng=rng, rule=rule)
        self._hold = 1.0
        self._effort = 1.0
        self._batches = Batches(table, learn, rng)
        self._seen_total = 0
        self._refusals = 0
        self.totals = {
            "ticks": 0,
            "steps": 0,
            "skipped_steps": 0,
            "tokens": 0,
            "promoted": 0,
            "rejected": 0,
            "restarts": 0,
        }
        self.history: list[TickReport] = []
        self._start()

    def _start(self) -> None:
        """Stand at the published version, with the saved optimiser if it fits and was learned from that version."""
        self._follow_store()
        if not self._state_file.is_file():
            return
        try:
            saved = load_file(self._state_file)
            stood_at = int(saved.pop(_STOOD_AT, torch.tensor(self._version)))
            if stood_at != self._version:  # what was learned meanwhile rests on a version that no longer serves
                raise ValueError(f"it rests on version {stood_at}")
            self._learner.load_state(saved)
        except (ValueError, OSError) as error:
            _log.warning(events.LEARNER_RESTARTED, reason=f"saved state refused: {error}", version=self._version)

    def _follow_store(self) -> None:
        self._version = self._store.current() or 0
        if self._version:
            manifest, tensors = self._store.load(self._version)
            self._stand_at(tensors, manifest.gate.get("on_base", ()))
        else:
            tensors = {}
            self._stand_at({})
        self._learner.restart(tensors)

    def _stand_at(self, tensors: Mapping[str, Tensor], on_base: Iterable[str] = ()) -> None:
        self._jury.stand_at(tensors, on_base)
        self._refer_to(tensors)

    def _refer_to(self, tensors: Mapping[str, Tensor]) -> None:
        self._learner.set_reference(tensors if self._learn.keep_anchors else None)

    def new_traces(self) -> int:
        """Traces inserted since the last tick that learned (an upper bound: expired ones count)."""
        return max(0, self._table.info().inserted_total - self._seen_total)

    def drifted(self) -> None:
        """A drift event: begin again with the first stage of the mixture, fresh traces alone, at full effort."""
        self._batches.begin()
        self._learner.shorten_average()
        self._effort = 1.0

    def follow_target(self, target_id: str) -> int:
        """Decoders serve this target from now on: what another one judged is removed from the table; how many traces.

        Raises:
          TableUnavailable: the table cannot be reached; nothing has changed.
        """
        removed = self._table.age_out(target_id)
        if removed:
            self.drifted()
            _log.info(events.TRACES_AGED_OUT, target_id=target_id, traces=removed)
        return removed

    def tick(self, reason: str, keep: int = 20, also: Collection[int] = ()) -> TickReport:
        """Learn, judge, perhaps publish; at most `keep` versions stay, and `also` those.

        Never raises for bad data or a refused candidate.
        """
        report = TickReport(reason=reason, at=self._clock())
        started = time.perf_counter()
        self.follow("another version serves")
        self._seen_total = self._table.info().inserted_total
        # What the base draft serves needs no rehearsal.
        if not self._batches.read(self._jury.on_base):
            report.seconds = time.perf_counter() - started
            _log.info(events.LEARNER_SKIPPED, reason="no traces to learn from")
            return report
        self._learner.centre(self._batches.fresh)
        steps = max(1, round(self._effort * self._learn.steps_per_tick))
        losses = [loss for loss in (self._one_step(report) for _ in range(steps)) if loss is not None]
        if losses:
            report.loss = float(np.mean(losses))
            asked = time.perf_counter()
            self._decide(report)
            self._rest(time.perf_counter() - asked)
        self._save()
        self._store.prune(keep, also)
        report.seconds = time.perf_counter() - started
        self._count(report)
        return report

    def _count(self, report: TickReport) -> None:
        self.totals["ticks"] += 1
        self.totals["steps"] += report.steps
        self.totals["skipped_steps"] += report.skipped_steps
        self.totals["tokens"] += report.tokens
        self.history = [*self.history[-31:], report]
        _log.info(
            events.LEARNER_TICKED,
            reason=report.reason,
            steps=report.steps,
            loss=report.loss,
            seconds=round(report.seconds, 3),
            tokens_per_s=round(report.tokens / max(report.seconds, 1e-9)),
            verdict=(report.verdict or {}).get("reason"),
        )

    def _one_step(self, report: TickReport) -> float | None:
        chosen, weights = self._batches.draw(self._hold)
        step = self._learner.step(chosen, weights)
        self._rest(step.seconds)
        report.tokens += step.tokens
        if step.skipped:
            report.skipped_steps += 1
            if self._learner.skipped_in_a_row >= MAX_SKIPPED:
                self._restart("loss was not finite three times in a row")
            return None
        report.steps += 1
        self._batches.advance()
        self._table.update_priorities(step.priorities)
        return step.loss

    def _rest(self, worked_s: float) -> None:
        """Leaves processor or GPU to others, so that over a tick the learner has `learn.duty_cycle` of it."""
        if self._learn.duty_cycle < 1.0:
            self._pause(worked_s * (1.0 / self._learn.duty_cycle - 1.0))

    def _restart(self, reason: str) -> None:
        self._learner.restart(self._jury.incumbent)
        self._refusals = 0
        self.totals["restarts"] += 1
        _log.warning(events.LEARNER_RESTARTED, reason=reason, version=self._store.current())

    def _decide(self, report: TickReport) -> None:
        candidate = self._learner.average()
        if not all(bool(torch.isfinite(t).all()) for t in candidate.values()):
            self._restart("the candidate's weights are not finite")
            return
        ruling = self._jury.judge(candidate)
        verdict = ruling.verdict
        report.verdict = ruling.report | {"hold": self._hold}
        if verdict.losers:
            self._hold = min(HOLD_MAX, self._hold * HOLD_UP)
        elif verdict.promote:
            self._hold = max(1.0, self._hold * HOLD_DOWN)
        idle = not verdict.promote and not verdict.losers and verdict.gain.mean < IDLE_GAIN
        self._effort = max(LEAST_EFFORT, self._effort / 2) if idle else 1.0
        if verdict.promote:
            try:
                report.published = self._publish(candidate, ruling, report.verdict).version
            except Superseded as error:
                report.verdict |= {"promote": False, "reason": str(error)}
                self.follow(str(error))
                return
            self._refusals = 0
            self.totals["promoted"] += 1
        else:
            self._refusals += 1
            self.totals["rejected"] += 1
            _log.info(
                events.CANDIDATE_REJECTED,
                reason=verdict.reason,
                gain=verdict.gain.as_dict(),
            )
            if self._refusals >= self._learn.max_refusals:
                self._restart(f"{self._refusals} refusals in a row")

    def _publish(self, tensors: dict[str, Tensor], ruling: Ruling, report: Mapping[str, Any]) -> Manifest:
        created = [s.trace.created_at for _, s in ruling.samples]
        manifest = self._store.publish(
            tensors,
            base_id=self._identity.base_id,
            tokenizer_hash=self._identity.tokenizer_hash,
            scope=self._identity.scope,
            scope_config=self._identity.scope_config,
            gate=report,
            window={"oldest": min(created), "newest": max(created), "learner_steps": self._learner.steps},
            config=self._identity.config,
            over=self._version,
        )
        self._version = manifest.version
        self._jury.accept(tensors, ruling)
        self._refer_to(tensors)
        _log.info(events.CANDIDATE_PROMOTED, version=manifest.version, gain=ruling.verdict.gain.as_dict())
        return manifest

    def rollback(self, reason: str) -> Manifest:
        """Publish the parent's tensors as a new version and go on learning from there."""
        manifest = quarantine.roll_back(self._store)
        _log.warning(events.DRAFT_ROLLED_BACK, version=manifest.version, reason=reason)
        self.follow(reason)
        return manifest

    def promote(self, version: int, *, force: bool = False) -> Manifest:
        """Publish an earlier version's tensors as a new version and go on learning from there.

        Raises:
          VersionQuarantined: live traffic refused it, and not `force`.
        """
        manifest = quarantine.promote(self._store, version, force=force)
        self.follow("promoted by hand")
        return manifest

    def follow(self, reason: str) -> bool:
        """Somebody else published: go on learning from what serves, with nothing of what was learned meanwhile.

        Returns whether the learner stood elsewhere.
        """
        if (self._store.current() or 0) == self._version:
            return False
        self._follow_store()
        self._refusals, self._effort = 0, 1.0
        self.totals["restarts"] += 1
        self._save()
        _log.warning(events.LEARNER_RESTARTED, reason=reason, version=self._version)
        return True

    def _save(self) -> None:
        self._state_file.parent.mkdir(parents=True, exist_ok=True)
        partial = self._state_file.with_suffix(".tmp")
        save_file(self._learner.state() | {_STOOD_AT: torch.tensor(self._version)}, partial)
        partial.replace(self._state_file)

    def status(self) -> dict[str, Any]:
        """Counters, the last ticks and the live version, as plain JSON values."""
        return {
            **self.totals,
            "draft_version": self._store.current(),
            "learner_steps": self._learner.steps,
            "last_loss": self.history[-1].loss if self.history else None,
            "history": [dataclasses.asdict(r) for r in self.history[-8:]],
        }
