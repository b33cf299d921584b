"""The chosen length against simulated traffic whose best one is known."""

import itertools
import random
from collections.abc import Callable, Sequence

import pytest

from policies.draft_length import FRESH, KEPT, RUN, SHARE, DraftLength
from policies.economics import mal_at
from policies.round_costs import REPEATS

K = 6
Rates = dict[str, Sequence[float]]


def price(k: int) -> float:
    """c_d = 0.1; verifying more positions costs a little more each."""
    return 1.0 + 0.1 * k + (0.1 + 0.02 * k if k else 0.0)


class Traffic:
    """Plays rounds against a policy: acceptance by depth is drawn, times are the price, with noise."""

    def __init__(self, rates: Rates, seed: int = 0) -> None:
        self.policy, self.rates, self.played = DraftLength(K), rates, list[int]()
        self.version = 1
        self._random = random.Random(seed)

    def play(self, rounds: int, classes: Sequence[str] = ("a",), load: Callable[[int], float] = lambda t: 1.0) -> None:
        for number in range(rounds):
            k = self.policy.choose(classes, self.version)
            judged = [self._judge(self.rates[name], k) for name in classes]
            seconds = 0.01 * price(k) * load(number) * (1.0 + 0.05 * self._random.random())
            self.policy.observe(classes, k, judged, seconds)
            self.played.append(k)

    def _judge(self, rates: Sequence[float], k: int) -> tuple[int, int]:
        accepted = 0
        while accepted < k and self._random.random() < rates[accepted]:
            accepted += 1
        return accepted, min(accepted + 1, k)

    def efficiency(self, rounds: Sequence[int], classes: Sequence[str] = ("a",)) -> float:
        """Expected tokens a second of these rounds, over those of the best fixed length."""
        tokens = [sum(mal_at(self.rates[name], k) for name in classes) for k in range(K + 1)]
        best = max(tokens[k] / price(k) for k in range(K + 1))
        return sum(tokens[k] for k in rounds) / sum(price(k) for k in rounds) / best


@pytest.mark.parametrize("rate", [0.03, 0.15, 0.4, 0.6, 0.75, 0.9])
def test_it_comes_to_within_three_percent_of_the_best_length(rate: float) -> None:
    traffic = Traffic({"a": [rate] * K})
    traffic.play(2500)
    assert traffic.efficiency(traffic.played[500:]) > 0.97


@pytest.mark.parametrize("rates", [[0.9, 0.8, 0.3, 0.2, 0.1, 0.1], [0.5, 0.7, 0.8, 0.9, 0.9, 0.9]])
def test_acceptance_may_change_with_depth(rates: list[float]) -> None:
    traffic = Traffic({"a": rates})
    traffic.play(2500)
    assert traffic.efficiency(traffic.played[500:]) > 0.97


def test_a_class_that_nothing_is_accepted_of_goes_without_a_draft_and_the_other_does_not() -> None:
    traffic = Traffic({"a": [0.85] * K, "b": [0.03] * K})
    for _ in range(40):
        traffic.play(30, ("a",))
        traffic.play(30, ("b",))
    assert traffic.policy.chosen["b"] == 0
    assert traffic.policy.chosen["a"] >= 4


def test_it_follows_acceptance_down_and_up_again() -> None:
    traffic = Traffic({"a": [0.85] * K})
    traffic.play(1500)
    assert traffic.policy.chosen["a"] >= 4
    traffic.rates = {"a": [0.03] * K}
    traffic.play(1500)
    assert traffic.policy.chosen["a"] == 0
    traffic.rates = {"a": [0.85] * K}
    traffic.play(3000)
    assert traffic.policy.chosen["a"] >= 4, "trials alone tell, for nothing is drafted otherwise"


def test_a_new_draft_version_is_tried_at_once() -> None:
    traffic = Traffic({"a": [0.03] * K})
    traffic.play(3000)
    assert traffic.policy.chosen["a"] == 0
    traffic.rates, traffic.version = {"a": [0.85] * K}, 2
    traffic.play(120)
    assert traffic.policy.chosen["a"] >= 4


def test_rows_of_several_classes_share_the_length_that_is_best_for_their_sum() -> None:
    both = ("a", "a", "a", "b")
    traffic = Traffic({"a": [0.85] * K, "b": [0.03] * K})
    traffic.play(2500, both)
    assert traffic.efficiency(traffic.played[500:], both) > 0.97
    assert traffic.policy.accept_at("a")[0] == pytest.approx(0.85, abs=0.1)
    assert traffic.policy.accept_at("b")[0] == pytest.approx(0.03, abs=0.05)


@pytest.mark.parametrize("rate", [0.03, 0.5, 0.9])
def test_it_tries_no_more_than_its_share(rate: float) -> None:
    traffic = Traffic({"a": [rate] * K})
    for number in range(1, 11):
        traffic.version = number
        traffic.play(300)
        assert traffic.policy.trials <= SHARE * 300 * number + RUN + (FRESH + RUN) * (number - 1)
    assert traffic.policy.trials >= SHARE * 3000 / 2, "and not nothing"


def test_trials_of_a_mixed_batch_count_for_all_of_its_classes() -> None:
    traffic = Traffic({name: [0.6] * K for name in "abcd"})
    traffic.play(3000, tuple("abcd"))
    assert traffic.policy.trials <= SHARE * 3000 + RUN


def test_two_equally_good_lengths_do_not_alternate() -> None:
    """At this rate k = 3 and k = 4 differ by less than a percent."""
    traffic = Traffic({"a": [0.73] * K})
    traffic.play(4000)
    ordinary = [k for k in traffic.played[1000:] if abs(k - traffic.policy.chosen["a"]) <= 2]
    changes = sum(a != b for a, b in itertools.pairwise(ordinary))
    assert changes < 0.1 * len(ordinary)


def test_load_that_comes_and_goes_does_not_mislead_it() -> None:
    traffic = Traffic({"a": [0.75] * K})
    traffic.play(3000, load=lambda number: 1.6 if number // 170 % 2 else 1.0)
    assert traffic.efficiency(traffic.played[500:]) > 0.97


def test_the_same_rounds_lead_to_the_same_choices() -> None:
    first, second = (Traffic({"a": [0.5] * K}, seed=4) for _ in range(2))
    first.play(600)
    second.play(600)
    assert first.played == second.played


def test_what_was_cut_short_is_continued_as_the_class_does() -> None:
    policy = DraftLength(3)
    for _ in range(400):
        policy.observe(("a",), 3, [(3, 3)], 1.0)
        policy.observe(("a",), 3, [(1, 2)], 1.0)
    # Accepted: first always, second and third in half of the rounds, so the third whenever it was reached.
    one, two, three = policy.accept_at("a")
    assert (one, two, three) == pytest.approx((1.0, 0.5, 1.0), abs=0.03)
    assert policy.further("a") == pytest.approx([2.0, 1.0, 1.0, 0.0], abs=0.08)


def test_depths_that_a_class_never_reached_follow_the_other_classes() -> None:
    policy = DraftLength(3)
    for _ in range(200):
        policy.observe(("known",), 3, [(3, 3)], 1.0)
        policy.observe(("known",), 3, [(1, 2)], 1.0)
        policy.observe(("new",), 1, [(1, 1)], 1.0)
    assert policy.accept_at("new")[1] == pytest.approx(0.5, abs=0.05)
    assert policy.accept_at("unseen")[1] == pytest.approx(0.5, abs=0.05)


def test_a_class_that_is_hardly_known_drafts() -> None:
    traffic = Traffic({"a": [0.0] * K})
    traffic.play(REPEATS * (K + 1))
    drafted = sum(k > 0 for k in traffic.played)
    traffic.play(40)
    assert sum(k > 0 for k in traffic.played) >= max(KEPT, drafted)


def test_many_classes_are_counted_as_one() -> None:
    policy = DraftLength(2)
    for number in range(100):
        policy.observe((f"client {number}",), 2, [(0, 1)], 1.0)
    assert len(policy.chosen) == 65
    assert "other" in policy.chosen
