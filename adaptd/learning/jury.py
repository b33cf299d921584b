"""What a candidate is judged on, and how: reserved traces, three drafts scored on the same ones, the gate's verdict.

The three are the candidate, the version that serves, and the day-0 draft, the floor. Where requests are gated each domain
is served by the better of candidate and day 0, so a domain that what was learned elsewhere does not suit loses nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from adaptd.config import GateConfig
from adaptd.learning.evaluate import Rule, profiles
from adaptd.learning.learner import DraftLearner
from buffers.table import ReplaySample, ReplayTable
from policies.floor import better_on_floor, gone, served
from policies.gate import GAIN_STRATUM, Score, Verdict, judge

#: Reserved traces that a decision looks through, and guards that it reads, in multiples of `gate.max_traces`.
_READ, _GUARDS = 8, 2

Sample = tuple[str, ReplaySample]


@dataclass(frozen=True, slots=True)
class Ruling:
    """A verdict and what it rests on."""

    verdict: Verdict
    on_base: frozenset[str]
    """Domains that the day-0 draft is to serve if the candidate is promoted."""
    samples: Sequence[Sample]
    """Stratum of the gate, trace."""
    opened: Sequence[Score]
    """The candidate's scores on them, in no domain the day-0 draft's."""
    gone: frozenset[str] = frozenset()
    """Domains that are not asked any more."""

    @property
    def report(self) -> dict[str, Any]:
        """For the manifest and `adaptd status`."""
        return self.verdict.as_dict() | {"on_base": sorted(self.on_base), "gone": sorted(self.gone)}


class Jury:
    """Scores drafts on the reserved traces of one table; owns what it knows of the version that serves.

    Args:
      learner: lends its draft for scoring; its weights are in place again afterwards.
      k: tokens proposed a round.
      max_tokens: longest sequence in a forward pass.
      rule: how the engine that serves accepts a proposal.
    """

    def __init__(
        self,
        table: ReplayTable,
        learner: DraftLearner,
        gate: GateConfig,
        *,
        k: int,
        max_tokens: int,
        rng: np.random.Generator,
        rule: Rule = "rejection",
    ) -> None:
        self._table, self._learner, self._gate = table, learner, gate
        self._k, self._max_tokens, self._rng = k, max_tokens, rng
        self._rule: Rule = rule
        self._floor_scores: dict[int, Score] = {}
        self.stand_at({}, ())

    def stand_at(self, tensors: Mapping[str, Tensor], on_base: Iterable[str]) -> None:
        """The version that serves: its tensors (empty: day 0) and the domains that day 0 serves beside it."""
        self.incumbent, self.on_base = tensors, frozenset(on_base)
        self._incumbent_scores: dict[int, Score] = {}

    def judge(self, candidate: Mapping[str, Tensor]) -> Ruling:
        """The gate's verdict on a candidate; all its tensors are finite."""
        (samples, absent), gate = self._samples(), self._gate
        opened = self._scored(samples, candidate)
        floor = self._once_scored(samples, {}, self._floor_scores)
        known = self._once_scored(samples, self.incumbent, self._incumbent_scores) if self.incumbent else floor
        on_base: frozenset[str] = frozenset()
        if self._learner.draft.gates_requests:
            on_base = better_on_floor(opened, floor, self.on_base, min_traces=gate.min_traces)
        verdict = judge(
            served(opened, floor, on_base),
            served(known, floor, self.on_base),
            min_gain=gate.min_gain,
            max_regression=gate.max_regression,
            min_traces=gate.min_traces,
            rng=self._rng,
            resamples=gate.resamples,
            level=gate.level,
            floor=floor,
            exchange=gate.exchange,
            gone=absent,
            gone_loss=gate.gone_loss,
        )
        return Ruling(verdict, on_base, samples, opened, absent)

    def accept(self, candidate: Mapping[str, Tensor], ruling: Ruling) -> None:
        """The candidate serves from now on."""
        self.stand_at(candidate, ruling.on_base)
        scored = zip(ruling.samples, ruling.opened, strict=True)
        self._incumbent_scores = {sample.info.key: score for (_, sample), score in scored}

    def _samples(self) -> tuple[list[Sample], frozenset[str]]:
        """Nothing ever learned from these. The newest of the domains that are asked now decide the gain; those of every other
        domain guard it. And the domains that are not asked any more."""
        limit, least = self._gate.max_traces, self._gate.min_traces
        reserved = sorted(self._table.all("reserved", _READ * limit), key=lambda s: s.info.key, reverse=True)
        by_domain: dict[str, list[ReplaySample]] = {}
        for sample in reserved:
            by_domain.setdefault(sample.trace.domain, []).append(sample)
        now = {s.trace.domain for s in reserved[:least]}
        each = min(limit // 2, max(least, _GUARDS * limit // max(1, len(by_domain) - len(now))))
        deciding = [s for s in reserved if s.trace.domain in now][:limit]
        guards = [s for domain, found in by_domain.items() if domain not in now for s in found[:each]]
        samples = [(GAIN_STRATUM, s) for s in deciding] + [("guard", s) for s in guards]
        return samples, gone([s.trace.domain for s in reserved])

    def _scored(self, samples: Sequence[Sample], tensors: Mapping[str, Tensor]) -> list[Score]:
        draft = self._learner.draft
        learning = draft.state()
        draft.load(tensors)
        try:
            traces = [s.trace for _, s in samples]
            found = profiles(draft.model, traces, self._k, max_tokens=self._max_tokens, rule=self._rule)
        finally:
            draft.load(learning)
        return [
            Score(domain=s.trace.domain, stratum=stratum, emitted=p.emitted, rounds=p.rounds)
            for (stratum, s), p in zip(samples, found, strict=True)
        ]

    def _once_scored(
        self, samples: Sequence[Sample], tensors: Mapping[str, Tensor], known: dict[int, Score]
    ) -> list[Score]:
        """Scores of a version that stays, kept in `known` by trace: each trace is scored once, those gone are forgotten."""
        for key in known.keys() - {s.info.key for _, s in samples}:
            del known[key]
        missing = [pair for pair in samples if pair[1].info.key not in known]
        if missing:
            for (_, sample), score in zip(missing, self._scored(missing, tensors), strict=True):
                known[sample.info.key] = score
        return [dataclasses.replace(known[s.info.key], stratum=stratum) for stratum, s in samples]
