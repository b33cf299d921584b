"""Prices of rounds: the lengths' own, whatever else the machine does."""

import random

import pytest

from policies.round_costs import REPEATS, RoundCosts

TRUE = [1.0, 1.2, 1.3, 1.6]


def timed(load: float = 1.0) -> RoundCosts:
    """Knows batch 1, from rounds at this load."""
    costs = RoundCosts(3)
    while (k := costs.due(1)) is not None:
        costs.put(1, k, load * TRUE[k], trial=True)
    return costs


def test_every_length_is_timed_in_turns_and_then_the_ratios_are_known() -> None:
    costs, order = RoundCosts(3), []
    with pytest.raises(ValueError, match=r"batch \(1\) was not timed yet"):
        costs.ratios(1)
    while (k := costs.due(1)) is not None:
        order.append(k)
        costs.put(1, k, 0.01 * TRUE[k], trial=True)
    assert order == [3, 2, 1, 0] * REPEATS
    assert costs.ratios(1) == pytest.approx(TRUE)


def test_sizes_of_batch_are_timed_each_for_itself_by_powers_of_two() -> None:
    costs = timed()
    assert costs.due(2) is not None
    for k in (3, 2, 1, 0) * REPEATS:
        costs.put(2, k, 1.0 + k, trial=True)
    assert costs.due(3) is None
    assert costs.ratios(3) == pytest.approx([1, 2, 3, 4])
    assert costs.ratios(1) == pytest.approx(TRUE)


def test_a_machine_that_became_slow_does_not_make_one_length_dear() -> None:
    """While k = 3 is played everything takes half as long again; trials of k = 1 then are not compared with the idle time."""
    costs, noise = timed(), random.Random(0)
    for number in range(200):
        k, trial = (1, True) if number % 20 == 19 else (3, False)
        costs.put(1, k, 1.5 * TRUE[k] * (1.0 + 0.02 * noise.random()), trial=trial)
    assert costs.ratios(1)[1] / costs.ratios(1)[3] == pytest.approx(TRUE[1] / TRUE[3], rel=0.03)


def test_a_length_that_became_dear_is_found_by_trials() -> None:
    costs = timed()
    for number in range(200):
        costs.put(1, 1, 2.4, trial=True) if number % 20 == 19 else costs.put(1, 0, 1.0, trial=False)
    assert costs.ratios(1)[1] == pytest.approx(2.4)


def test_one_round_that_hung_changes_nothing() -> None:
    costs = timed()
    for seconds in (TRUE[3], 90.0, TRUE[3], TRUE[3]):
        costs.put(1, 3, seconds, trial=False)
    costs.put(1, 1, 70.0, trial=True)
    costs.put(1, 1, TRUE[1], trial=True)
    assert costs.ratios(1) == pytest.approx(TRUE)


def test_the_length_timed_longest_ago_is_named() -> None:
    costs = timed()
    assert costs.stalest(1, but=3) == 2
    costs.put(1, 2, TRUE[2], trial=True)
    assert costs.stalest(1, but=3) == 1


def test_a_longest_draft_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"k_max \(0\)"):
        RoundCosts(0)
