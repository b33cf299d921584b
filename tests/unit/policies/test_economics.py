"""What speculation is worth."""

import math

import pytest

from policies.economics import Costs, best_depth, expected_speedup, mal_at, recommended_depth


def test_the_speedup_is_the_length_over_the_price_of_a_round() -> None:
    costs = Costs(draft=0.05, verify=0.2)
    assert costs.round(4) == pytest.approx(1.4)
    assert expected_speedup(2.8, 4, costs) == pytest.approx(2.0)


def test_below_the_break_even_length_speculation_costs_time() -> None:
    """A launch-bound draft of 0.4 target steps: four proposals must bring 2.6 tokens."""
    costs = Costs(draft=0.4, verify=0.0)
    assert costs.round(4) == pytest.approx(2.6)
    assert expected_speedup(2.5, 4, costs) < 1.0 < expected_speedup(2.7, 4, costs)


def test_the_length_at_a_depth_follows_from_conditional_acceptance() -> None:
    assert mal_at([0.5, 0.5, 0.5], 0) == 1.0
    assert mal_at([0.5, 0.5, 0.5], 2) == pytest.approx(1.75)
    assert mal_at([1.0, 1.0, 0.0, 1.0], 4) == pytest.approx(3.0)


def test_the_best_depth_is_short_where_drafting_is_dear_and_none_where_it_never_pays() -> None:
    accept = [0.7] * 8
    cheap, dear = best_depth(accept, Costs(0.02, 0.1)), best_depth(accept, Costs(0.3, 0.1))
    assert cheap[0] > dear[0] > 0
    assert cheap[1] > dear[1] > 1.0
    assert best_depth([0.1] * 8, Costs(0.3, 0.1)) == (0, 1.0)


def test_a_depth_of_zero_costs_one_step() -> None:
    assert Costs(0.3, 0.5).round(0) == 1.0


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Costs(-0.1, 0.0),
        lambda: Costs(0.1, math.nan),
        lambda: Costs(0.1, 0.1).round(-1),
        lambda: expected_speedup(5.5, 4, Costs(0.1, 0.1)),
        lambda: expected_speedup(math.nan, 4, Costs(0.1, 0.1)),
        lambda: mal_at([0.5], 2),
        lambda: mal_at([1.5], 1),
    ],
)
def test_values_out_of_range_are_refused(wrong) -> None:
    with pytest.raises(ValueError, match="must"):
        wrong()


def test_the_recommended_depth_weighs_each_depths_own_cost_of_verification() -> None:
    """At a flat c_v deeper pays; where verifying more positions costs more, it stops paying."""
    accept_at = [0.9] * 8
    flat = {k: Costs(draft=0.05, verify=0.1) for k in (1, 2, 4, 8)}
    steep = {k: Costs(draft=0.05, verify=0.3 * k) for k in (1, 2, 4, 8)}
    assert recommended_depth(accept_at, flat)[0] == 8
    assert recommended_depth(accept_at, steep) == (4, pytest.approx(mal_at(accept_at, 4) / 2.4))
    assert recommended_depth([0.1] * 8, steep) == (0, 1.0)
    with pytest.raises(ValueError, match="must lie within 1 and the 2 depths"):
        recommended_depth([0.5, 0.5], flat)
