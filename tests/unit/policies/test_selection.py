"""Draws whose stated probabilities are the true ones, and the mixture of a batch."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from policies.selection import (
    Counts,
    Mixture,
    Prioritized,
    Uniform,
    importance_weights,
    least_used,
    prioritized,
    uniform,
)

PRIORITIES = np.array([0.1, 1.0, 0.0, 0.5, 2.0, 0.4])


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_prioritized_draws_each_index_as_often_as_it_states(exponent: float) -> None:
    """Chi-square over 4,000 single draws, which stratification cannot make more even; p > 0.01."""
    rng = np.random.default_rng(0)
    drawn = [prioritized(PRIORITIES, 1, exponent, rng) for _ in range(4_000)]
    counts = np.bincount([int(indices[0]) for indices, _ in drawn], minlength=6)
    expected = PRIORITIES**exponent / (PRIORITIES**exponent).sum()
    assert counts[2] == 0
    possible = expected > 0
    assert stats.chisquare(counts[possible], 4_000 * expected[possible]).pvalue > 0.01
    for indices, probabilities in drawn[:50]:
        np.testing.assert_allclose(probabilities, expected[indices])


def test_a_batch_draw_has_the_stated_expected_counts() -> None:
    rng = np.random.default_rng(1)
    totals = np.zeros(6)
    for _ in range(2_000):
        totals += np.bincount(prioritized(PRIORITIES, 8, 1.0, rng)[0], minlength=6)
    expected = 16_000 * PRIORITIES / PRIORITIES.sum()
    # Stratified counts vary by less than one draw a batch around their mean.
    assert np.abs(totals - expected).max() < 4 * np.sqrt(2_000 * 0.5)


def test_importance_weights_undo_the_priorities() -> None:
    """The weighted mean over prioritised draws must be the plain mean of what was drawn from: |z| < 4."""
    rng = np.random.default_rng(2)
    priorities = rng.random(40) + 0.05
    values = rng.normal(size=40) + 2 * priorities
    estimates = []
    for _ in range(800):
        indices, probabilities = prioritized(priorities, 16, 1.0, rng)
        weights = 1.0 / (40 * probabilities)
        np.testing.assert_allclose(importance_weights(probabilities, 40, 1.0), weights / weights.max())
        estimates.append((weights * values[indices]).mean())
    assert abs(np.mean(estimates) - values.mean()) < 4 * np.std(estimates) / np.sqrt(800)
    assert abs(np.average(values, weights=priorities) - values.mean()) > 8 * np.std(estimates) / np.sqrt(800)


def test_equal_priorities_give_no_more_than_two_copies_and_few_of_them() -> None:
    rng = np.random.default_rng(3)
    for _ in range(50):
        indices, _ = prioritized(np.ones(97), 10, 1.0, rng)
        assert np.bincount(indices).max() <= 2


@given(
    priorities=st.lists(st.floats(0.0, 1e6), min_size=1, max_size=30).filter(lambda p: max(p) > 0),
    n=st.integers(0, 40),
    exponent=st.floats(0.0, 50.0),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_every_draw_is_in_range_and_possible(priorities: list[float], n: int, exponent: float, seed: int) -> None:
    indices, probabilities = prioritized(priorities, n, exponent, np.random.default_rng(seed))
    assert indices.shape == probabilities.shape == (n,)
    assert ((indices >= 0) & (indices < len(priorities))).all()
    assert (probabilities > 0).all()


class Fixed(np.random.Generator):
    """A generator whose `random` always gives one value."""

    def __init__(self, value: float) -> None:
        super().__init__(np.random.PCG64(0))
        self.value = value

    def random(self, size: int) -> np.ndarray:  # type: ignore[override]  # the one form that is used
        return np.full(size, self.value)


def test_the_last_draw_cannot_fall_off_the_end() -> None:
    """random() just below 1 times a cumulative sum rounds to the sum itself: an index of N, once in a blue moon."""
    indices, _ = prioritized([0.1] * 10 + [0.0], 10, 1.0, Fixed(np.nextafter(1.0, 0.0)))
    assert indices.max() <= 9


def test_a_draw_of_exactly_zero_does_not_pick_a_priority_of_zero() -> None:
    indices, _ = prioritized([0.0, 1.0], 1, 1.0, Fixed(0.0))
    assert indices.tolist() == [1]


@pytest.mark.parametrize(("size", "n"), [(10, 4), (10, 10), (10, 25), (1, 3), (5, 0)])
def test_uniform_repeats_no_index_before_all_were_drawn(size: int, n: int) -> None:
    indices, probabilities = uniform(size, n, np.random.default_rng(0))
    counts = np.bincount(indices, minlength=size)
    assert counts.sum() == n
    assert counts.max() - counts.min() <= 1
    np.testing.assert_array_equal(probabilities, np.full(n, 1 / size))


def test_uniform_is_uniform() -> None:
    rng = np.random.default_rng(4)
    counts = sum(np.bincount(uniform(10, 3, rng)[0], minlength=10) for _ in range(2_000))
    assert stats.chisquare(counts).pvalue > 0.01


@pytest.mark.parametrize(("exponent", "shares"), [(0.0, (1 / 3, 1 / 3, 1 / 3)), (1.0, (6 / 11, 3 / 11, 2 / 11))])
def test_what_was_learned_from_least_is_drawn_most(exponent: float, shares: tuple[float, ...]) -> None:
    counts = np.bincount(least_used([0, 1, 2], 20_000, exponent, np.random.default_rng(6)), minlength=3)
    assert stats.chisquare(counts, np.array(shares) * 20_000).pvalue > 0.01


def test_of_nothing_there_is_no_least_used() -> None:
    with pytest.raises(ValueError, match="number of traces"):
        least_used([], 1, 2.0, np.random.default_rng(0))


def test_draws_repeat_with_the_generators_seed() -> None:
    for selector in (Prioritized(0.7), Uniform()):
        first, again = (selector(PRIORITIES, 5, np.random.default_rng(9)) for _ in range(2))
        np.testing.assert_array_equal(first[0], again[0])


def test_the_mixture_learns_from_fresh_traces_alone_until_warm() -> None:
    mixture = Mixture(lam=1.0, epsilon=0.5, warmup_steps=3)
    assert [mixture.counts(8, step) for step in range(3)] == [Counts(8, 0, 0)] * 3
    assert mixture.counts(8, 3) != Counts(8, 0, 0)


@given(lam=st.floats(0.0, 10.0), epsilon=st.floats(0.0, 3.0), batch=st.integers(0, 40), step=st.integers(0, 5_000))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_counts_sum_to_the_batch_and_are_never_negative(lam: float, epsilon: float, batch: int, step: int) -> None:
    counts = Mixture(lam, epsilon, warmup_steps=2).counts(batch, step)
    assert counts.fresh + counts.selected + counts.anchors == batch
    assert min(counts.fresh, counts.selected, counts.anchors) >= 0


def test_over_many_steps_the_shares_are_one_to_lambda_to_epsilon_even_for_a_tiny_epsilon() -> None:
    """Rounding each batch by itself would give 8 * 0.05 / 2.05 = 0.2 anchors, that is none, ever."""
    mixture = Mixture(lam=1.0, epsilon=0.05, warmup_steps=0)
    counts = [mixture.counts(8, step) for step in range(2_050)]
    assert sum(c.anchors for c in counts) == 400
    assert sum(c.selected for c in counts) == 8_000
    assert sum(c.fresh for c in counts) == 8_000
    assert max(c.anchors for c in counts) == 1


def test_a_share_that_is_a_whole_number_is_the_same_in_every_step() -> None:
    mixture = Mixture(lam=1.0, epsilon=1.0, warmup_steps=0)
    assert {mixture.counts(9, step) for step in range(500)} == {Counts(3, 3, 3)}


@pytest.mark.parametrize(
    ("priorities", "n", "exponent", "message"),
    [
        ([], 1, 1.0, r"number of traces \(0\)"),
        ([1.0], -1, 1.0, r"n \(-1\)"),
        ([1.0, -1.0], 1, 1.0, "at least 0"),
        ([1.0, float("nan")], 1, 1.0, "finite"),
        ([0.0, 0.0], 1, 1.0, "all 0"),
        ([1.0], 1, -1.0, r"exponent \(-1.0\)"),
    ],
)
def test_bad_arguments_are_refused_by_name(priorities: list[float], n: int, exponent: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prioritized(priorities, n, exponent, np.random.default_rng(0))


def test_a_negative_weight_of_the_mixture_and_an_impossible_probability_are_refused() -> None:
    with pytest.raises(ValueError, match=r"epsilon \(-0.1\)"):
        Mixture(lam=1.0, epsilon=-0.1, warmup_steps=0)
    with pytest.raises(ValueError, match="probabilities"):
        importance_weights([0.0], 3, 1.0)
