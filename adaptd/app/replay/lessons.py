"""Records to traces: each gets its teacher, its tokens and its judgement; what cannot be used is counted with its reason."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from adaptd.app.replay.models import ReplayModels
from adaptd.config import Config
from adaptd.decoding.request import DecodeRequest
from adaptd.ingest.render import Rendered, Unrenderable
from adaptd.ingest.spool import Queued, Spool
from adaptd.ingest.teach import judge, label
from adaptd.ingest.teacher import Teacher, Wanted, decide, wrote
from buffers.trace import Trace


@dataclass(frozen=True, slots=True, kw_only=True)
class TeachingOptions:
    """How answers are judged."""

    wanted: Wanted = "target"
    names: Collection[str] = ()
    """Names of the target in the log."""
    assume_target: bool = False
    """Whether an answer whose writer the log does not name is the target's."""
    temperature: float = 1.0
    """Of requests that name none."""
    max_tokens: int = 256
    """Longest answer that the target gives anew, where the request sets no limit."""


class Lesson(NamedTuple):
    """A record with its trace."""

    queued: Queued
    trace: Trace
    teacher: Teacher


def request_id(queued: Queued) -> str:
    """Names the record's trace; by it the gate's traces are told from the others."""
    return f"replay-{queued.digest.hex()}"


class Lessons:
    """Makes lessons of records.

    Args:
      spool: counts what is refused and who taught.
    """

    def __init__(self, config: Config, models: ReplayModels, options: TeachingOptions, spool: Spool) -> None:
        self._models, self._options, self._spool = models, options, spool
        self._renderer = models.renderer()
        self._about, self._k_tail = models.provenance(config, options.temperature), config.capture.k_tail
        self._regenerator = models.regenerator(config, options.temperature, options.max_tokens)

    def prepare(self, queued: Sequence[Queued]) -> list[Lesson]:
        """Lessons of those records that can be used, in order."""
        chosen = [(q, *self._choose(q)) for q in queued]
        found: dict[int, Trace] = {}
        labelled: dict[int, Trace] = {}
        asked: dict[int, DecodeRequest] = {}
        for index, (q, teacher, rendered) in enumerate(chosen):
            if rendered is None or teacher is None:
                continue
            name = request_id(q)
            if teacher != "regenerate":
                labelled[index] = label(q.record, rendered, name, self._about)
            elif self._regenerator is not None:
                asked[index] = self._regenerator.request(q.record, rendered.prompt, name, q.rank)
        self._judge({i: t for i, t in labelled.items() if chosen[i][1] == "target"}, found)
        found |= {i: t for i, t in labelled.items() if chosen[i][1] == "black-box"}
        if asked and self._regenerator is not None:
            times = [chosen[i][0].record.at for i in asked]
            found |= zip(asked, self._regenerator.answer(list(asked.values()), times), strict=True)
        return [Lesson(chosen[i][0], found[i], teacher) for i in sorted(found) if (teacher := chosen[i][1]) is not None]

    def _judge(self, labelled: dict[int, Trace], found: dict[int, Trace]) -> None:
        if not labelled or self._models.target is None:
            return
        for index, trace in zip(
            labelled, judge(self._models.target, list(labelled.values()), self._k_tail), strict=True
        ):
            found[index] = trace
            logprob = trace.target_logprob.astype(np.float64)
            self._spool.tally("judged positions", "all", len(logprob))
            # Under greedy decoding the target's own answer is its first choice everywhere: another is somebody else's.
            if trace.temperature == 0:
                self._spool.tally("greedy positions", "all", len(logprob))
                self._spool.tally(
                    "greedy positions", "first choice", int((trace.topk_ids[:, 0] == trace.response).sum())
                )

    def _choose(self, queued: Queued) -> tuple[Teacher | None, Rendered | None]:
        options, record = self._options, queued.record
        own = wrote(record, options.names, options.assume_target)
        decision = decide(options.wanted, record, own, has_target=self._models.target is not None)
        if decision.teacher is None:
            self._spool.refuse(decision.reason, queued.place)
            return None, None
        try:
            with_answer = decision.teacher != "regenerate"
            rendered = self._renderer.render(record, own=own is True, with_answer=with_answer)
        except Unrenderable as error:
            self._spool.refuse(str(error), queued.place)
            return None, None
        self._spool.tally("teacher", f"{decision.teacher}: {decision.reason}")
        return decision.teacher, rendered

    def provisional(self, queued: Sequence[Queued]) -> list[tuple[Queued, Trace]]:
        """Hard-label traces of what is logged, for scores that select: a question alone stands for its answer."""
        found = []
        for q in queued:
            own = wrote(q.record, self._options.names, self._options.assume_target) is True
            try:
                rendered = self._renderer.render(q.record, own=own, with_answer=q.record.answers())
            except Unrenderable:
                continue
            if not rendered.answer:
                if len(rendered.prompt) < 2:
                    continue
                rendered = Rendered(rendered.prompt[:1], rendered.prompt[1:])
            found.append((q, label(q.record, rendered, "", self._about)))
        return found
