"""SurpriseRatio, the sequence score and the priority in its modes."""

from __future__ import annotations

import math

import numpy as np
import pytest

from policies.surprise import PRIORITY_FLOOR, sequence_score, surprise_priority, surprise_ratio


def test_the_ratio_is_the_tokens_probability_over_the_mean_of_the_favourites() -> None:
    topk = np.log([[0.6, 0.2], [0.6, 0.2], [0.5, 0.3]])
    ratios = surprise_ratio(np.log([0.6, 0.2, 0.001]), topk)
    np.testing.assert_allclose(ratios, [1.5, 0.5, 0.0025])


def test_the_ratio_does_not_underflow_where_every_favourite_is_tiny() -> None:
    np.testing.assert_allclose(surprise_ratio([-800.0], [[-800.0, -800.0]]), [1.0])


def test_a_token_that_the_draft_excludes_has_ratio_zero_and_an_unknown_one_stays_unknown() -> None:
    ratios = surprise_ratio([-np.inf, np.nan, -1.0], [[-0.1, -3.0]] * 3)
    assert ratios[0] == 0.0
    assert np.isnan(ratios[1])
    assert ratios[2] > 0.0


def test_the_score_is_the_share_above_tau_of_the_known_ratios() -> None:
    assert sequence_score([0.5, 1.0, 1.5, 2.0, np.nan], tau=1.0) == 0.5
    assert math.isnan(sequence_score([np.nan], tau=1.0))
    assert math.isnan(sequence_score([], tau=1.0))


def test_agreement_and_surprise_prefer_opposite_traces() -> None:
    expected_by_draft, surprising = [2.0] * 9 + [0.1], [0.1] * 9 + [2.0]
    assert surprise_priority(expected_by_draft, "agreement", 1.0) > surprise_priority(surprising, "agreement", 1.0)
    assert surprise_priority(expected_by_draft, "surprise", 1.0) < surprise_priority(surprising, "surprise", 1.0)
    assert surprise_priority(surprising, "surprise", 1.0) == pytest.approx(PRIORITY_FLOOR + (1 - PRIORITY_FLOOR) * 0.9)
    assert surprise_priority(surprising, "uniform", 1.0) == surprise_priority(expected_by_draft, "uniform", 1.0) == 1.0


@pytest.mark.parametrize("mode", ["agreement", "surprise", "uniform"])
@pytest.mark.parametrize("ratios", [[0.0], [5.0], [np.nan], [], [0.0, 5.0]])
def test_every_trace_keeps_a_chance_to_be_drawn(mode: str, ratios: list[float]) -> None:
    assert 0.0 < surprise_priority(ratios, mode, tau=1.0) <= 1.0  # type: ignore[arg-type]  # parametrised by name


def test_a_trace_without_known_ratios_comes_first() -> None:
    assert surprise_priority([np.nan], "surprise", 1.0) == surprise_priority([np.nan], "agreement", 1.0) == 1.0


def test_bad_arguments_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"\(2,\)"):
        surprise_ratio([0.0, 0.0], [[0.0]])
    with pytest.raises(ValueError, match=r"mode \('surprize'\)"):
        surprise_priority([1.0], "surprize", 1.0)  # type: ignore[arg-type]  # what a configuration may hold
    with pytest.raises(ValueError, match=r"tau \(-1.0\)"):
        sequence_score([1.0], -1.0)
