"""One tick of adaptation: sample traces, take steps, ask the gate, publish.

Invariants: reserved traces are read by the gate and by nothing else; the store is written only after a verdict to
promote; after any failure the learner stands at a published version or at day 0.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from adaptd import events
from adaptd.config import GateConfig, LearnConfig
from adaptd.learning.evaluate import profiles
from adaptd.learning.learner import DraftLearner
from adaptd.log import logger
from buffers.table import NO_KEY, ReplaySample, ReplayTable
from checkpoints.manifest import Manifest
from checkpoints.store import CheckpointStore
from policies.gate import GAIN_STRATUM, Score, Verdict, judge
from policies.selection import Mixture, Prioritized, Uniform, importance_weights

_log = logger(__name__)

#: Reserved traces that a decision looks through, and guards that it reads, in multiples of `gate.max_traces`.
_READ, _GUARDS = 8, 2

#: What a loss on old traffic does to the anchors' share of a batch, what a promotion takes back, and its bounds: the
#: share follows the gate as a multiplier follows its constraint (dual ascent, Boyd and Vandenberghe 2004, chapter 5).
HOLD_UP, HOLD_DOWN, HOLD_MAX = 1.5, 0.9, 6.0

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
    ) -> None:
        self._table, self._store, self._learner, self._identity = table, store, learner, identity
        self._learn, self._gate, self._k = learn, gate, k
        self._state_file, self._rng, self._clock = state_file, rng, clock
        self._hold = 1.0
        self._last_key = NO_KEY
        self._seen_total = 0
        self._phase_steps = 0
        self._refusals = 0
        self._incumbent: Mapping[str, Tensor] = {}
        self._incumbent_scores: dict[int, Score] = {}
        self._floor_scores: dict[int, Score] = {}
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
        """Stand at the published version, with the saved optimiser if it fits."""
        if self._store.current() is None:
            self._stand_at({})
        else:
            self._follow_store()
        if self._state_file.is_file():
            try:
                self._learner.load_state(load_file(self._state_file))
            except (ValueError, OSError) as error:
                _log.warning(
                    events.LEARNER_RESTARTED, reason=f"saved state refused: {error}", version=self._store.current()
                )

    def _follow_store(self) -> None:
        _, tensors = self._store.load(self._store.current() or 0)
        self._stand_at(tensors)
        self._learner.restart(tensors)

    def _stand_at(self, tensors: Mapping[str, Tensor]) -> None:
        self._incumbent = tensors
        self._incumbent_scores.clear()
        self._learner.set_reference(tensors if self._learn.keep_anchors else None)

    def new_traces(self) -> int:
        """Traces inserted since the last tick that learned (an upper bound: expired ones count)."""
        return max(0, self._table.info().inserted_total - self._seen_total)

    def drifted(self) -> None:
        """A drift event: begin again with the first stage of the mixture, fresh traces alone."""
        self._phase_steps = 0

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

    def tick(self, reason: str, keep: int = 20) -> TickReport:
        """Learn, judge, perhaps publish; at most `keep` versions stay. Never raises for bad data or a refused candidate."""
        report = TickReport(reason=reason, at=self._clock())
        started = time.perf_counter()
        self._seen_total = self._table.info().inserted_total
        pools = self._pools()
        if pools is None:
            report.seconds = time.perf_counter() - started
            _log.info(events.LEARNER_SKIPPED, reason="no traces to learn from")
            return report
        self._learner.centre([s.trace for s in pools["fresh"]])
        losses = [
            loss
            for loss in (self._one_step(pools, report) for _ in range(self._learn.steps_per_tick))
            if loss is not None
        ]
        if losses:
            report.loss = float(np.mean(losses))
            self._decide(report)
        self._save()
        self._store.prune(keep)
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

    def _pools(self) -> dict[str, list[ReplaySample]] | None:
        """One read of the table for the whole tick; each stratum as many traces as its share can use."""
        draws = self._learn.batch_traces * self._learn.steps_per_tick
        fresh = self._table.fresh(self._last_key, draws)
        if fresh:
            self._last_key = max(s.info.key for s in fresh)
        pools = {"fresh": fresh, "selected": [], "anchors": []}
        if self._table.can_sample(1, "recent"):
            selector = Prioritized(self._learn.priority_exponent)
            pools["selected"] = self._table.sample(draws, selector, self._rng, "recent")
        if self._table.can_sample(1, "anchors"):
            pools["anchors"] = self._table.sample(draws, Uniform(), self._rng, "anchors")
        if not fresh:
            pools["fresh"] = pools["selected"]
        return pools if pools["fresh"] else None

    def _one_step(self, pools: Mapping[str, Sequence[ReplaySample]], report: TickReport) -> float | None:
        mixture = Mixture(self._learn.lam, self._learn.epsilon * self._hold, self._learn.mix_after)
        counts = mixture.counts(self._learn.batch_traces, self._phase_steps)
        chosen: list[ReplaySample] = []
        weights: list[np.ndarray] = []
        for stratum, n in (("fresh", counts.fresh), ("selected", counts.selected), ("anchors", counts.anchors)):
            pool = pools[stratum] or pools["fresh"]
            picks = [pool[i] for i in self._rng.integers(len(pool), size=n)]
            if stratum == "selected" and picks:
                probabilities = np.array([s.info.probability for s in picks])
                weights.append(
                    importance_weights(probabilities, picks[0].info.table_size, self._learn.importance_exponent)
                )
            else:
                weights.append(np.ones(len(picks)))
            chosen += picks
        step = self._learner.step(chosen, np.concatenate(weights))
        report.tokens += step.tokens
        if step.skipped:
            report.skipped_steps += 1
            if self._learner.skipped_in_a_row >= MAX_SKIPPED:
                self._restart("loss was not finite three times in a row")
            return None
        report.steps += 1
        self._phase_steps += 1
        self._table.update_priorities(step.priorities)
        return step.loss

    def _restart(self, reason: str) -> None:
        self._learner.restart(self._incumbent)
        self._refusals = 0
        self.totals["restarts"] += 1
        _log.warning(events.LEARNER_RESTARTED, reason=reason, version=self._store.current())

    def _decide(self, report: TickReport) -> None:
        samples = self._judged_samples()
        candidate_state = self._learner.average()
        if not all(bool(torch.isfinite(t).all()) for t in candidate_state.values()):
            self._restart("the candidate's weights are not finite")
            return
        candidate = self._scored(samples, candidate_state)
        incumbent = self._once_scored(samples, self._incumbent, self._incumbent_scores)
        floor = self._once_scored(samples, {}, self._floor_scores) if self._incumbent else None
        verdict = judge(
            candidate,
            incumbent,
            min_gain=self._gate.min_gain,
            max_regression=self._gate.max_regression,
            min_traces=self._gate.min_traces,
            rng=self._rng,
            resamples=self._gate.resamples,
            level=self._gate.level,
            floor=floor,
        )
        report.verdict = verdict.as_dict() | {"hold": self._hold}
        if verdict.losers:
            self._hold = min(HOLD_MAX, self._hold * HOLD_UP)
        elif verdict.promote:
            self._hold = max(1.0, self._hold * HOLD_DOWN)
        if verdict.promote:
            report.published = self._publish(candidate_state, verdict, samples).version
            self._incumbent_scores = {s.info.key: score for (_, s), score in zip(samples, candidate, strict=True)}
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

    def _judged_samples(self) -> list[tuple[str, ReplaySample]]:
        """Reserved traces alone, which nothing ever learned from. Those of the domains that are asked now decide the gain;
        those of every other domain guard it."""
        limit = self._gate.max_traces
        reserved = sorted(self._table.all("reserved", _READ * limit), key=lambda s: s.info.key, reverse=True)
        now = {s.trace.domain for s in reserved[: self._gate.min_traces]}
        others = {s.trace.domain for s in reserved} - now
        each = max(self._gate.min_traces, _GUARDS * limit // max(1, len(others)))
        chosen = [(GAIN_STRATUM, s) for s in [s for s in reserved if s.trace.domain in now][:limit]]
        for domain in sorted(others):
            chosen += [("guard", s) for s in [s for s in reserved if s.trace.domain == domain][: min(each, limit // 2)]]
        return chosen

    def _scores(self, samples: Sequence[tuple[str, ReplaySample]]) -> list[Score]:
        found = profiles(
            self._learner.draft.model, [s.trace for _, s in samples], self._k, max_tokens=self._learn.max_tokens
        )
        return [
            Score(domain=s.trace.domain, stratum=stratum, emitted=p.emitted, rounds=p.rounds)
            for (stratum, s), p in zip(samples, found, strict=True)
        ]

    def _scored(self, samples: Sequence[tuple[str, ReplaySample]], tensors: Mapping[str, Tensor]) -> list[Score]:
        """Scores of a version; the learner's own weights are in place again afterwards."""
        learning = self._learner.draft.state()
        self._learner.draft.load(tensors)
        try:
            return self._scores(samples)
        finally:
            self._learner.draft.load(learning)

    def _once_scored(
        self, samples: Sequence[tuple[str, ReplaySample]], tensors: Mapping[str, Tensor], known: dict[int, Score]
    ) -> list[Score]:
        """Scores of a version that stays, kept in `known` by trace: each trace is scored once, those gone are forgotten."""
        keys = {s.info.key for _, s in samples}
        for gone in known.keys() - keys:
            del known[gone]
        missing = [pair for pair in samples if pair[1].info.key not in known]
        if missing:
            for (_, sample), score in zip(missing, self._scored(missing, tensors), strict=True):
                known[sample.info.key] = score
        return [dataclasses.replace(known[s.info.key], stratum=stratum) for stratum, s in samples]

    def _publish(
        self, tensors: dict[str, Tensor], verdict: Verdict, samples: Sequence[tuple[str, ReplaySample]]
    ) -> Manifest:
        created = [s.trace.created_at for _, s in samples]
        manifest = self._store.publish(
            tensors,
            base_id=self._identity.base_id,
            tokenizer_hash=self._identity.tokenizer_hash,
            scope=self._identity.scope,
            scope_config=self._identity.scope_config,
            gate=verdict.as_dict(),
            window={"oldest": min(created), "newest": max(created), "learner_steps": self._learner.steps},
            config=self._identity.config,
        )
        self._stand_at(tensors)
        _log.info(
            events.CANDIDATE_PROMOTED,
            version=manifest.version,
            gain=verdict.gain.as_dict(),
        )
        return manifest

    def rollback(self, reason: str) -> Manifest:
        """Publish the parent's tensors as a new version and go on learning from there."""
        manifest = self._store.rollback()
        self._follow_store()
        _log.warning(events.DRAFT_ROLLED_BACK, version=manifest.version, reason=reason)
        return manifest

    def promote(self, version: int) -> Manifest:
        """Publish an earlier version's tensors as a new version and go on learning from there."""
        manifest = self._store.promote(version)
        self._follow_store()
        return manifest

    def _save(self) -> None:
        self._state_file.parent.mkdir(parents=True, exist_ok=True)
        partial = self._state_file.with_suffix(".tmp")
        save_file(self._learner.state(), partial)
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
