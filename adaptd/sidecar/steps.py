"""Where the draft's proposals were accepted and rejected, from the counts that vLLM gives per verification step.

The first token comes from reading the prompt, without proposals. Each step then drafted d tokens, accepted a of them and
emitted a + 1: the accepted ones, then a correction where a < d, or the bonus where a = d. The end of the answer (end of
sequence, stop string, length) may cut the last step off. A step without proposals is not in the counts; then they do not
add up to the answer, and nothing is claimed about its positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from buffers.trace import Source


@dataclass(frozen=True, slots=True)
class Steps:
    """Verification steps of one request, in order."""

    accepted: tuple[int, ...]
    drafted: tuple[int, ...]

    def sources(self, size: int) -> npt.NDArray[np.uint8]:
        """[size] how each token of the answer came to be, `buffers.trace.Source`; all UNKNOWN if it does not add up."""
        unknown = np.full(size, Source.UNKNOWN, np.uint8)
        codes: list[int] = [Source.UNKNOWN]
        before_last = 1
        for a, d in zip(self.accepted, self.drafted, strict=True):
            before_last = len(codes)
            codes += [Source.ACCEPTED] * a + [Source.CORRECTION if a < d else Source.BONUS]
        # Only the last step may be cut, and at least one of its tokens was emitted.
        if len(codes) < size or (size <= before_last and size != len(codes)):
            return unknown
        return np.asarray(codes[:size], np.uint8)

    def by_depth(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Steps in which the proposal at depth i was judged, and in which it was accepted."""
        depth = max(self.drafted, default=0)
        judged = [min(a + 1, d) for a, d in zip(self.accepted, self.drafted, strict=True)]
        return (
            tuple(sum(j > i for j in judged) for i in range(depth)),
            tuple(sum(a > i for a in self.accepted) for i in range(depth)),
        )


@dataclass(frozen=True, slots=True)
class Figures:
    """Acceptance of one request as the server counts it: nothing is added for the token that reading the prompt gave."""

    rounds: int
    proposed: int
    accepted: int
    k: int
    steps: Steps | None
    """None below `--per-request-spec-decode-metrics detailed`."""


def figures(found: Mapping[str, Any] | None) -> Figures | None:
    """From `metrics.speculative_decoding` of an answer; None where it is not there or not as expected (several choices)."""
    if not found:
        return None
    try:
        rounds, proposed = int(found["num_spec_steps"]), int(found["num_draft_tokens"])
        accepted, k = int(found["num_accepted_draft_tokens"]), int(found["num_spec_tokens"])
        a, d = found.get("per_step_accepted"), found.get("per_step_drafted")
        steps = Steps(tuple(map(int, a)), tuple(map(int, d))) if a and d else None
    except (KeyError, TypeError, ValueError):
        return None
    if steps is not None and (
        len(steps.accepted) != len(steps.drafted)
        or any(not 0 <= a <= d for a, d in zip(steps.accepted, steps.drafted, strict=True))
    ):
        steps = None
    return Figures(rounds, proposed, accepted, k, steps)
