"""When a learning tick is due."""

from __future__ import annotations

import math

import pytest

from policies.triggers import LearnTrigger

TRIGGER = LearnTrigger(min_new_traces=64, interval_s=300.0)


@pytest.mark.parametrize(
    ("new_traces", "seconds", "drifted", "reason"),
    [
        (63, 299.9, False, None),
        (64, 0.0, False, "traces"),
        (1, 300.0, False, "time"),
        (1, math.inf, False, "time"),
        (1, 0.0, True, "drift"),
        (100, 1000.0, True, "drift"),
        (100, 1000.0, False, "traces"),
        (0, math.inf, True, None),
    ],
)
def test_the_first_reason_that_holds_is_given(
    new_traces: int, seconds: float, drifted: bool, reason: str | None
) -> None:
    assert TRIGGER.due(new_traces, seconds, drifted) == reason


def test_either_trigger_can_be_switched_off() -> None:
    assert LearnTrigger(None, 300.0).due(10_000, 1.0, False) is None
    assert LearnTrigger(64, None).due(63, math.inf, False) is None


@pytest.mark.parametrize(
    ("traces", "interval", "name"), [(0, 1.0, "min_new_traces"), (1, 0.0, "interval_s"), (1, math.nan, "interval_s")]
)
def test_a_trigger_that_would_always_be_due_is_refused(traces: int, interval: float, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        LearnTrigger(traces, interval)
