"""The interval of mean acceptance length."""

import math

import numpy as np
import pytest

from policies.forecast import mal_interval


def test_the_mean_is_a_ratio_of_sums() -> None:
    found = mal_interval([10, 90], [10, 30], np.random.default_rng(0))
    assert found.mean == 2.5
    assert found.low <= found.mean <= found.high


def test_the_interval_covers_the_true_ratio_as_often_as_it_says() -> None:
    """300 samples of 60 traces whose MAL is 2: the 95 % interval holds it in 90 to 99 % of them."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(300):
        rounds = rng.integers(5, 40, 60).astype(float)
        emitted = rounds * 2 + rng.normal(size=60) * np.sqrt(rounds)
        found = mal_interval(emitted, rounds, rng, resamples=300)
        hits += found.low <= 2.0 <= found.high
    assert 270 <= hits <= 297


def test_what_is_too_little_has_no_bounds() -> None:
    rng = np.random.default_rng(0)
    assert math.isnan(mal_interval([], [], rng).mean)
    one = mal_interval([4], [2], rng)
    assert one.mean == 2
    assert math.isnan(one.low)


@pytest.mark.parametrize(("values", "name"), [({"resamples": 0}, "resamples"), ({"level": 1.0}, "level")])
def test_an_argument_out_of_range_is_named(values: dict[str, float], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        mal_interval([1, 2], [1, 1], np.random.default_rng(0), **values)  # type: ignore[arg-type]
