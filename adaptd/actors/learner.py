"""The learner actor: a learner cycle behind Ray calls."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import ray

from adaptd import log
from adaptd.actors.parts import learner_cycle, load_draft, placement
from adaptd.actors.threads import set_threads
from adaptd.config import Config
from buffers.errors import TableUnavailable
from buffers.open import open_table
from policies.triggers import LearnTrigger


class LearnerActor:
    """The one learner. `tick` runs in the default group; `status` answers from another while it runs."""

    def __init__(self, config: Config, buffer_url: str) -> None:
        log.configure(config.log.level, config.log.style)
        set_threads(config.learn.threads, config.learn.niceness)
        # Where decoders share the GPU through CUDA's multi-process service their kernels come first; read when CUDA starts.
        os.environ.setdefault("CUDA_MPS_CLIENT_PRIORITY", "1")
        device, _ = placement(config, config.ray.learner_gpus)
        draft, identity = load_draft(config, device, "float32", serving=False)
        table = open_table(buffer_url, config.deployment, **config.buffer.model_dump(exclude={"url"}))
        self._cycle = learner_cycle(config, draft, identity, table, config.home, np.random.default_rng(config.seed))
        self._keep = config.checkpoints.keep
        self._trigger = LearnTrigger(config.learn.min_new_traces, config.learn.interval_s)
        self._new_target: str | None = None  # traces of another one may still be in the buffer

    def follow_target(self, target_id: str) -> None:
        """What another target judged is removed from the buffer: now, or before anything is learned if it is unreachable."""
        self._new_target = target_id
        with contextlib.suppress(TableUnavailable):
            self._age_out()

    def _age_out(self) -> None:
        if self._new_target is not None:
            self._cycle.follow_target(self._new_target)
            self._new_target = None

    def tick(self, drifted: bool, since_last_s: float, also: Sequence[int] = ()) -> dict[str, Any] | None:
        """Learn if a trigger is due; the report of the tick, or None. Raises nothing for an unreachable buffer.

        `also`: versions that are not pruned, because they may have to come back.
        """
        if drifted:
            self._cycle.drifted()
        try:
            self._age_out()
            reason = self._trigger.due(self._cycle.new_traces(), since_last_s, drifted)
            return dataclasses.asdict(self._cycle.tick(reason, self._keep, also)) if reason else None
        except TableUnavailable:
            return None

    def rollback(self, reason: str) -> dict[str, Any]:
        """Publish the parent's tensors as a new version; waits for a running tick."""
        return dataclasses.asdict(self._cycle.rollback(reason))

    def promote(self, version: int, force: bool = False) -> dict[str, Any]:
        """Publish an earlier version again, also a quarantined one if `force`; waits for a running tick."""
        return dataclasses.asdict(self._cycle.promote(version, force=force))

    def follow(self, reason: str) -> bool:
        """Go on learning from what serves; waits for a running tick, which cannot publish over it."""
        return self._cycle.follow(reason)

    @ray.method(concurrency_group="control")
    def status(self) -> dict[str, Any]:
        """Counters and last ticks, also while a tick runs."""
        return self._cycle.status()
