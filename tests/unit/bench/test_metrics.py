"""Metrics of the shift benchmark, on curves made by hand."""

import math

import numpy as np
import pytest

from adaptd.bench.metrics import Curve, area, edges, forgetting, interval, median_interval, recovery, time_to

PHASES = [(0, 200), (200, 400)]


def curve(*mals: float) -> Curve:
    """100 requests of 60 tokens at each MAL."""
    emitted = np.full(100 * len(mals), 60.0)
    return Curve(emitted, emitted / np.repeat(np.array(mals), 100))


FROZEN = curve(1.0, 1.0, 1.0, 1.0)
ORACLE = curve(2.0, 2.0, 2.0, 2.0)


def test_mal_is_a_ratio_of_sums() -> None:
    assert Curve(np.array([10.0, 30.0]), np.array([10.0, 10.0])).mal(0, 2) == 2.0
    assert math.isnan(FROZEN.mal(5, 5))


@pytest.mark.parametrize(
    ("start", "stop", "found"),
    [(0, 100, [0, 50, 100]), (0, 120, [0, 50, 120]), (10, 40, [10, 40]), (0, 149, [0, 50, 149])],
)
def test_bins_cover_the_span_and_none_is_short(start: int, stop: int, found: list[int]) -> None:
    assert edges(start, stop) == found


def test_area_is_requests_times_difference() -> None:
    assert area(curve(1.0, 1.5), curve(1.0, 1.0), 0, 200) == pytest.approx(50)
    assert area(curve(1.5, 1.5), curve(1.0, 1.0), 0, 130) == pytest.approx(65)


def test_recovery_is_one_for_the_oracle_and_none_for_the_frozen_draft() -> None:
    assert recovery(ORACLE, FROZEN, ORACLE, PHASES) == pytest.approx(1)
    assert recovery(FROZEN, FROZEN, ORACLE, PHASES) == pytest.approx(0)
    assert recovery(curve(1.0, 2.0, 1.0, 2.0), FROZEN, ORACLE, PHASES) == pytest.approx(0.5)
    assert recovery(curve(1.0, 2.0, 1.0, 2.0), FROZEN, ORACLE, PHASES, settle=100) == pytest.approx(1)


def test_a_share_of_next_to_nothing_is_not_known() -> None:
    assert math.isnan(recovery(ORACLE, FROZEN, curve(*[1.01] * 4), PHASES))
    assert math.isnan(time_to(ORACLE, FROZEN, FROZEN, PHASES[0]))


def test_time_to_90_is_the_end_of_the_first_bin_that_reaches_it() -> None:
    assert time_to(curve(1.0, 1.95, 2.0, 2.0), FROZEN, ORACLE, PHASES[0]) == 150
    assert time_to(curve(1.0, 1.5, 2.0, 2.0), FROZEN, ORACLE, PHASES[0]) == 200, "never: the phase's length"


def test_forgetting_takes_the_difficulty_of_the_requests_out() -> None:
    """The returning requests are harder for every draft; this one kept its advantage but for a tenth."""
    frozen = curve(1.0, 1.0, 1.0, 0.5)
    assert forgetting(curve(1.5, 2.0, 1.0, 0.9), frozen, (0, 200), (300, 400)) == pytest.approx(0.1)
    assert forgetting(frozen, frozen, (0, 200), (300, 400)) == pytest.approx(0)


def test_interval_is_students_and_says_what_it_does_not_know() -> None:
    found = interval([1.0, 2.0, 3.0])
    assert found["mean"] == 2
    assert found["high"] - found["mean"] == pytest.approx(4.3027 / math.sqrt(3), abs=1e-3)
    assert interval([1.0, math.nan]) == {"mean": 1.0, "low": None, "high": None}
    assert interval([]) == {"mean": None, "low": None, "high": None}


def test_a_median_is_surer_with_more_values() -> None:
    rng = np.random.default_rng(0)
    widths = []
    for number in (10, 100, 1000):
        low, high = median_interval(rng.normal(1.0, 0.1, number).tolist())
        assert low <= 1.0 <= high
        widths.append(high - low)
    # The standard error of a normal median is 1.25 sigma / sqrt(n).
    assert widths[0] > widths[1] > widths[2] == pytest.approx(2 * 1.96 * 1.2533 * 0.1 / 1000**0.5, rel=0.3)
    assert median_interval([2.0]) == (2.0, 2.0)
    with pytest.raises(ValueError, match="at least one"):
        median_interval([])
