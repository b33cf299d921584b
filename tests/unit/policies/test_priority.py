"""Priorities by what a trace's positions are measured at."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch

from adaptd.config import LearnConfig
from policies.priority import Measure, is_measure, measured_priorities
from policies.surprise import PRIORITY_FLOOR

#: Four outcomes: a sure target and a flat one; a draft that agrees with the sure one.
SURE, FLAT = [0.97, 0.01, 0.01, 0.01], [0.25, 0.25, 0.25, 0.25]


def logs(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows).log()


def measured(name: Measure, p: torch.Tensor, q: torch.Tensor, row: list[int], traces: int) -> list[float | None]:
    loss = (p.exp() * (p - q)).sum(-1)
    return measured_priorities(name, p=p, q=q, loss=loss, row=torch.tensor(row), traces=traces)


def test_the_names_are_those_that_a_configuration_may_use() -> None:
    names = get_args(LearnConfig.model_fields["priority"].annotation)
    assert {n for n in names if is_measure(n)} == {"loss", "entropy", "overlap"}
    assert {n for n in names if not is_measure(n)} == {"surprise", "agreement", "uniform"}
    with pytest.raises(ValueError, match=r"priority \('losss'\) must be one of: .*surprise, .*overlap"):
        is_measure("losss")  # type: ignore[arg-type]  # what a caller without types may pass


def test_each_is_the_mean_over_the_traces_positions() -> None:
    p, q = logs(SURE, FLAT, FLAT), logs(FLAT, FLAT, SURE)
    kl = (p.exp() * (p - q)).sum(-1).tolist()
    expected = [PRIORITY_FLOOR + (kl[0] + kl[2]) / 2, PRIORITY_FLOOR + kl[1]]
    assert measured("loss", p, q, [0, 1, 0], 2) == pytest.approx(expected)
    # Overlap of SURE and FLAT: 0.25 + 3 * 0.01; of FLAT with itself: 1.
    assert measured("overlap", p, q, [0, 1, 1], 2) == pytest.approx(
        [PRIORITY_FLOOR + 0.72, PRIORITY_FLOOR + 0.36], abs=1e-6
    )
    sure = -(0.97 * math.log(0.97) + 0.03 * math.log(0.01)) / math.log(4)
    assert measured("entropy", p, q, [0, 1, 0], 2) == pytest.approx(
        [PRIORITY_FLOOR + (sure + 1) / 2, PRIORITY_FLOOR + 1], abs=1e-6
    )


def test_they_prefer_different_traces() -> None:
    """A sure target that the draft misses, against a flat one that it nearly has."""
    p, q = logs(SURE, FLAT), logs([0.1, 0.3, 0.3, 0.3], [0.3, 0.3, 0.2, 0.2])
    missed, flat = measured("overlap", p, q, [0, 1], 2)
    assert missed is not None
    assert flat is not None
    assert missed > flat
    missed, flat = measured("entropy", p, q, [0, 1], 2)
    assert missed is not None
    assert flat is not None
    assert flat > missed


@pytest.mark.parametrize("name", get_args(Measure))
def test_a_trace_without_positions_keeps_its_priority_and_nothing_ever_has_none(name: Measure) -> None:
    p = logs(SURE, [1.0, 0.0, 0.0, 0.0])
    found = measured_priorities(name, p=p, q=p, loss=torch.zeros(2), row=torch.tensor([0, 2]), traces=3)
    assert found[1] is None
    assert all(value is not None and PRIORITY_FLOOR <= value < math.inf for value in (found[0], found[2]))


def test_a_loss_that_is_not_finite_gives_no_priority() -> None:
    p = logs(SURE, SURE, SURE)
    loss = torch.tensor([math.nan, math.inf, 0.5])
    found = measured_priorities("loss", p=p, q=p, loss=loss, row=torch.tensor([0, 1, 2]), traces=3)
    assert found == [None, None, pytest.approx(PRIORITY_FLOOR + 0.5)]
