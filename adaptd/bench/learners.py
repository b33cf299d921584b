"""The learners of the shift benchmark, as YAML, each behind one interface: serve with `model`, learn from `observe`.

frozen   the day-0 draft
online   as published for online speculative decoding and for fine-tuning on accepted text: traces are kept until
         the next update, used, and forgotten; every update is served at once, without a gate
cycle    adaptd's own: `adaptd.learning.cycle` with replay table, mixture, gate and store
oracle   sees the whole stream in advance: `epochs` over all of its traces, then frozen; with `held_out` over other
         answers to prompts of the same domains, which tells learning from learning by heart
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator
from transformers import PreTrainedModel

from adaptd.actors.parts import draft_learner, learner_cycle, load_draft
from adaptd.bench.verify import rejections_only
from adaptd.config import Config, checked
from adaptd.decoding.build import build_recall
from adaptd.errors import ConfigError
from adaptd.report.monitor import ALL
from buffers.memory_table import MemoryTable
from buffers.table import NO_KEY, ReplaySample, SampleInfo, TableLimits
from buffers.trace import Source, Trace, is_reserved
from checkpoints.store import CheckpointStore
from policies.drift import DriftDetector
from policies.triggers import LearnTrigger

_NONE: Mapping[str, Sequence[Trace]] = MappingProxyType({})

Kind = Literal["frozen", "online", "cycle", "oracle"]


class LearnerSpec(BaseModel):
    """One learner."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    about: str = ""
    kind: Kind
    settings: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Over the configuration, by section: `adapt`, `learn`, `gate`, `capture`, `recall`."""
    rates: tuple[float, ...] = ()
    """Learning rates of the sweep; `learn.lr` in `settings` is the one it chose."""
    update_every: int = Field(32, ge=1)
    """Online: requests between two updates."""
    uses: int = Field(1, ge=1)
    """Online: passes over the traces of one update."""
    epochs: int = Field(3, ge=1)
    """Oracle: passes over the whole stream."""
    held_out: bool = False
    """Oracle: learn from as many other answers in the stream's place: what is learned is then not what is asked."""
    first: int | None = Field(None, ge=1)
    """Oracle: learn from the first so many requests alone, as nobody could do better who has seen no more."""
    k_top: int | None = Field(None, ge=1)
    """Most likely target tokens to learn from, without draws of the others; None: all that was captured."""

    @model_validator(mode="after")
    def _only_an_oracle(self) -> LearnerSpec:
        if (self.held_out or self.first is not None) and self.kind != "oracle":
            raise ValueError(f"held_out and first are for an oracle; kind is {self.kind!r}")
        return self

    @property
    def learns(self) -> bool:
        """Whether it learns from what it serves."""
        return self.kind in ("online", "cycle")

    def with_rate(self, rate: float) -> LearnerSpec:
        """The same learner at one learning rate, with none left to choose from."""
        learn = {**self.settings.get("learn", {}), "lr": rate}
        return self.model_copy(update={"settings": {**self.settings, "learn": learn}, "rates": ()})

    def configured(self, config: Config) -> Config:
        """The configuration under this learner's settings.

        Raises:
          ConfigError: a setting is refused; the message names learner, key, value, rule.
        """
        merged = config.model_dump(exclude_unset=True)
        for section, values in self.settings.items():
            merged[section] = {**merged.get(section, {}), **values}
        try:
            return checked(merged)
        except ConfigError as error:
            raise ConfigError(f"learner {self.name}: {error}") from error

    def require(self, config: Config) -> None:
        """Check what a run would find only after the answers have been generated.

        Raises:
          ConfigError: settings are refused, or there are fewer target tokens captured than this learner wants.
        """
        self.configured(config)
        if self.k_top is not None and self.k_top > config.capture.k_top:
            raise ConfigError(
                f"learner {self.name}: k_top ({self.k_top}) must be at most the {config.capture.k_top} target tokens that "
                f"answers are captured with; give --set capture.k_top={self.k_top}"
            )


class Learner:
    """The frozen draft, and what the others add to it."""

    def __init__(self, config: Config, seed: int, spec: LearnerSpec) -> None:
        self.config, self._k_top = config, spec.k_top
        self.rng = np.random.default_rng([seed, 0x1EA2])
        self.draft, _ = load_draft(config, "cpu", "float32", serving=False)
        self.recall = build_recall(config, "cpu")
        self.version = 0
        self.seconds = 0.0
        self.trained_tokens = 0
        self.steps = 0

    @property
    def model(self) -> PreTrainedModel:
        """The draft that serves now."""
        return self.draft.model

    @property
    def trainable_fraction(self) -> float:
        """Learned parameters over the draft's."""
        return 0.0

    def prepare(self, answers: Sequence[Trace]) -> None:
        """In front of the stream; only the oracle looks."""

    def observe(self, traces: Sequence[Trace], again: Mapping[str, Sequence[Trace]] = _NONE) -> None:
        """Traces that the served draft left behind, in order; may change what is served.

        Args:
          again: other answers to their prompts, by request id.
        """

    def change_target(self, target_id: str) -> None:
        """The server is restarted with another target: recall lives in its memory. What was learned stays served."""
        self.recall = build_recall(self.config, "cpu")

    def captured(self, trace: Trace) -> int:
        """Bytes kept of a trace."""
        return self.kept(trace).nbytes

    def kept(self, trace: Trace) -> Trace:
        """What of a trace is captured to learn from."""
        kept = rejections_only(trace) if self.config.capture.positions == "rejected" else trace
        if kept.tail_ids is not None and (self._k_top is not None or not self.config.capture.k_tail):
            kept = dataclasses.replace(kept, tail_ids=None)
        if self._k_top is None:
            return kept
        top = slice(self._k_top)
        return dataclasses.replace(kept, topk_ids=kept.topk_ids[:, top], topk_logprobs=kept.topk_logprobs[:, top])


class Online(Learner):
    """Learn from each batch of new traces, then forget it."""

    def __init__(self, config: Config, seed: int, spec: LearnerSpec) -> None:
        super().__init__(config, seed, spec)
        self._spec = spec
        self._waiting: list[Trace] = []
        self._learner = draft_learner(config, self.draft)

    @property
    def trainable_fraction(self) -> float:
        """Learned parameters over the draft's."""
        return self.draft.trainable_fraction

    def observe(self, traces: Sequence[Trace], again: Mapping[str, Sequence[Trace]] = _NONE) -> None:
        """One update for each `update_every` traces."""
        for trace in traces:
            self._waiting.append(self.kept(trace))
            if len(self._waiting) >= self._spec.update_every:
                self._update()

    def _update(self) -> None:
        started = time.perf_counter()
        for _ in range(self._spec.uses):
            self._pass(self._waiting)
        self._waiting.clear()
        self.version += 1
        self.seconds += time.perf_counter() - started

    def _pass(self, traces: Sequence[Trace]) -> None:
        usable = [t for t in traces if len(t.topk_ids)]
        order = self.rng.permutation(len(usable))
        size = self.config.learn.batch_traces
        for start in range(0, len(order), size):
            report = self._learner.step([_sample(usable[i]) for i in order[start : start + size]])
            self.trained_tokens += report.tokens
            self.steps += 1


class Oracle(Online):
    """Trained on the whole stream before it begins: what learning online can hope for."""

    def prepare(self, answers: Sequence[Trace]) -> None:
        """`epochs` passes over every answer, or over the `first` ones."""
        started = time.perf_counter()
        kept = [self.kept(answer) for answer in answers[: self._spec.first]]
        for _ in range(self._spec.epochs):
            self._pass(kept)
        self.draft.load(self._learner.average())
        self.seconds += time.perf_counter() - started

    def observe(self, traces: Sequence[Trace], again: Mapping[str, Sequence[Trace]] = _NONE) -> None:
        """Nothing: it has seen them."""


class Cycle(Learner):
    """adaptd's learner: ticks of `LearnerCycle` as new traces come in; serves what the gate lets through."""

    def __init__(self, config: Config, seed: int, spec: LearnerSpec) -> None:
        super().__init__(config, seed, spec)
        self._folder = tempfile.TemporaryDirectory(prefix="adaptd-bench-")
        home = Path(self._folder.name)
        limits = TableLimits(**config.buffer.model_dump(exclude={"url", "ttl_s"}), ttl_s=None)
        self._table = MemoryTable("bench", limits, salt=str(seed))
        self._store = CheckpointStore(home / "checkpoints")
        self._learning, identity = load_draft(config, "cpu", "float32", serving=False)
        self._cycle = learner_cycle(config, self._learning, identity, self._table, home, self.rng)
        self._trigger = LearnTrigger(config.learn.min_new_traces, None)
        self._drift = DriftDetector(delta=config.drift.delta)

    @property
    def trainable_fraction(self) -> float:
        """Learned parameters over the draft's."""
        return self._learning.trainable_fraction

    def observe(self, traces: Sequence[Trace], again: Mapping[str, Sequence[Trace]] = _NONE) -> None:
        """Insert, and tick when enough is new or traffic drifted, as the daemon does."""
        share = self.config.capture.reserved_share
        kept = []
        for trace in traces:
            reserved = is_reserved(trace.request_id, share)
            # What is reserved is never learned from, and decoders keep no draws of it.
            mine = self.kept(trace)
            kept.append(dataclasses.replace(mine, reserved=True, tail_ids=None) if reserved else mine)
            # What the gate judges by is asked once: nothing learned may have seen its prompt.
            kept += [] if reserved else [self.kept(other) for other in again.get(trace.request_id, ())]
        self._table.insert(kept, [t.surprise for t in kept])
        if drifted := self._drifted(traces):
            self._cycle.drifted()
        reason = self._trigger.due(self._cycle.new_traces(), 0.0, drifted)
        if reason is None:
            return
        report = self._cycle.tick(reason)
        self.seconds += report.seconds
        self.trained_tokens += report.tokens
        self.steps += report.steps
        if report.published is not None:
            self.version = report.published
            manifest, tensors = self._store.load(report.published)
            self.draft.load(tensors)
            self.draft.keep_on_base(manifest.gate.get("on_base", ()))

    def _drifted(self, traces: Sequence[Trace]) -> bool:
        """Whether acceptance changed with one of these requests: of its domain, or of all traffic."""
        events = []
        for trace in traces:
            accepted = int((trace.source == Source.ACCEPTED).sum())
            rounds = max(1, trace.response_len - accepted)
            share = min(1.0, accepted / (self.config.engine.k * rounds))
            events += [self._drift.update(name, share) for name in (trace.domain, ALL)]
        return any(events)

    def change_target(self, target_id: str) -> None:
        """The old target's traces go, and the mixture begins again."""
        super().change_target(target_id)
        self._cycle.follow_target(target_id)


def build(spec: LearnerSpec, config: Config, seed: int) -> Learner:
    """The learner of a specification, at day 0."""
    kinds = {"frozen": Learner, "online": Online, "oracle": Oracle, "cycle": Cycle}
    return kinds[spec.kind](spec.configured(config), seed, spec)


def _sample(trace: Trace) -> ReplaySample:
    return ReplaySample(SampleInfo(NO_KEY, 1.0, 1.0, 1, 1, "recent"), trace)
