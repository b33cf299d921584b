"""Promotions under watch: a ruin at once, a ruin in small steps, a ruin after gains; and what the gate promised."""

import json
from collections.abc import Iterator

import numpy as np
import pytest

from policies.watch import ChainWatch, Confirmed, Regression, Trial, Window, promised_share, window

BEFORE = {"d": Window(0.5, 0.0)}


def shares(mean: float, seed: int = 0, n: int = 20) -> Iterator[float]:
    """Acceptance of requests with 20 proposals each."""
    rng = np.random.default_rng(seed)
    while True:
        yield float(rng.binomial(n, mean) / n)


def feed(watch: ChainWatch, version: int, mean: float, n: int, seed: int = 0) -> tuple[object, int]:
    """Requests of one version until something follows; that, and how many it took."""
    for count, share in zip(range(1, n + 1), shares(mean, seed), strict=False):
        if found := watch.observe(version, "d", share):
            return found, count
    return None, n


def test_a_ruined_version_goes_back_within_few_requests() -> None:
    watch = ChainWatch()
    watch.promoted(1, 0, BEFORE)
    found, count = feed(watch, 1, 0.25, 400)
    assert isinstance(found, Regression)
    assert (found.back_to, found.refused) == (0, (1,))
    assert "50.0% expected" in found.reason
    assert count < 60
    assert feed(watch, 1, 0.0, 50)[0] is None, "it is being taken back"


@pytest.mark.parametrize("seed", range(20))
def test_a_version_as_good_as_before_stays(seed: int) -> None:
    watch = ChainWatch()
    watch.promoted(1, 0, BEFORE)
    found, _ = feed(watch, 1, 0.5, 400, seed)
    assert isinstance(found, Confirmed)
    assert watch.before is None


def test_a_trial_ends_in_time_even_where_nothing_is_certain() -> None:
    for share, expected in ((0.44, Regression), (0.46, Confirmed)):
        watch = ChainWatch(max_requests=50)
        watch.promoted(1, 0, BEFORE)
        found = [watch.observe(1, "d", share) for _ in range(50)]
        assert not any(found[:49])
        assert isinstance(found[49], expected)


def test_many_small_losses_are_caught_by_their_sum_and_all_of_them_go_back() -> None:
    """Each version loses 8 % against the one before, less than any of them may; the first was never confirmed."""
    watch = ChainWatch()
    mean, found = 0.5, None
    for version in range(1, 12):
        watch.promoted(version, version - 1, {"d": Window(mean, 0.01)})
        mean *= 0.92
        found, _ = feed(watch, version, mean, 30, seed=version)
        if found:
            break
    assert isinstance(found, Regression)
    assert found.back_to == 0
    assert found.refused == tuple(range(1, version + 1))
    assert version < 8


def test_versions_that_follow_each_other_fast_do_not_put_the_end_off() -> None:
    """Nobody serves long enough for its own test: the chain's has its end all the same."""
    watch = ChainWatch(max_requests=60)
    found = None
    for version in range(1, 100):
        watch.promoted(version, version - 1, {"d": Window(0.44, 0.0)})
        found = next(filter(None, (watch.observe(version, "d", 0.395) for _ in range(5))), None)
        if found:
            break
    assert isinstance(found, Regression), "0.395 is 10.2 % less than 0.44: never sure, and below at the end"
    assert (version, found.back_to) == (12, 0)


def test_a_ruin_after_gains_goes_back_to_the_version_before_it_not_to_the_start() -> None:
    watch = ChainWatch()
    watch.promoted(1, 0, {"d": Window(0.4, 0.0)})
    assert feed(watch, 1, 0.5, 5)[0] is None
    watch.promoted(2, 1, {"d": Window(0.6, 0.0)})
    found, _ = feed(watch, 2, 0.38, 400)
    assert isinstance(found, Regression), "not below 0.4 by much, but far below 0.6"
    assert (found.back_to, found.refused) == (1, (2,))


def test_a_chain_that_is_confirmed_leaves_its_newest_version_to_its_own_test() -> None:
    watch = ChainWatch()
    watch.promoted(1, 0, {"d": Window(0.2, 0.0)})
    watch.promoted(2, 1, {"d": Window(0.5, 0.0)})
    found, _ = feed(watch, 2, 0.35, 400)
    assert isinstance(found, Confirmed), "far above 0.2"
    assert (found.version, watch.unconfirmed, watch.before) == (1, (2,), 1)
    found, _ = feed(watch, 2, 0.35, 400, seed=1)
    assert isinstance(found, Regression)
    assert (found.back_to, found.refused) == (1, (2,))


def test_what_stays_unconfirmed_after_a_step_back_is_watched_under_its_new_number() -> None:
    watch = ChainWatch()
    watch.promoted(1, 0, BEFORE)
    feed(watch, 1, 0.5, 3)
    watch.promoted(2, 1, {"d": Window(0.9, 0.0)})
    found, _ = feed(watch, 2, 0.5, 400)
    assert isinstance(found, Regression)
    assert (found.back_to, found.refused) == (1, (2,))
    watch.taken_back(3)
    assert watch.unconfirmed == (1, 3)
    found, _ = feed(watch, 3, 0.1, 400)
    assert isinstance(found, Regression)
    assert (found.back_to, found.refused) == (0, (1, 3))


def test_only_requests_of_watched_versions_and_known_domains_count() -> None:
    watch = ChainWatch()
    watch.promoted(2, 1, BEFORE)
    for _ in range(50):
        assert watch.observe(1, "d", 0.0) is None, "served by the version before"
        assert watch.observe(2, "new", 0.0) is None, "nothing is known of it from before"
    assert (watch.status()["requests"], watch.status()["accepted"]) == (50, None)


def test_a_version_that_cannot_be_compared_is_let_be_in_time() -> None:
    """Else the other servers would wait for it for ever."""
    watch = ChainWatch(max_requests=20)
    watch.promoted(1, 0, BEFORE)
    for share in (0.2, 0.2):
        watch.observe(1, "d", share)
    found = [watch.observe(1, "new", 0.0) for _ in range(18)]
    assert not any(found[:-1])
    assert isinstance(found[-1], Confirmed), "two requests are not enough to go back for"


def test_a_domain_is_compared_with_itself_when_the_mixture_moves() -> None:
    watch = ChainWatch()
    watch.promoted(1, 0, {"easy": Window(0.8, 0.0), "hard": Window(0.3, 0.0)})
    for share in [next(shares(0.3, seed)) for seed in range(300)]:
        found = watch.observe(1, "hard", share)
        assert not isinstance(found, Regression)


@pytest.mark.parametrize(("mean", "promise"), [(0.8, "kept"), (0.52, "broken"), (0.6, "open")])
def test_the_promise_is_told_apart_from_a_regression(mean: float, promise: str) -> None:
    """MAL 3 (k 4, half accepted) and a sure gain of 13.3 % promise MAL 3.4: a share of 0.6."""
    assert promised_share(0.5, 0.4 / 3, 4) == pytest.approx(0.6)
    watch = ChainWatch()
    watch.promoted(1, 0, BEFORE, gain=0.4 / 3, k=4)
    found, _ = feed(watch, 1, mean, 400)
    assert isinstance(found, Confirmed), "less than promised is not less than before"
    feed(watch, 1, mean, 350, seed=1)
    assert watch.promise == promise


def test_a_window_asks_for_less_where_it_knows_less() -> None:
    assert window([0.5] * 7) is None
    few, many = window([0.3, 0.7] * 4), window([0.3, 0.7] * 50)
    assert few is not None
    assert many is not None
    assert few.mean == many.mean == pytest.approx(0.5)
    assert few.expected < many.expected < 0.5


def test_a_restart_goes_on_watching_and_one_over_another_version_does_not() -> None:
    watch = ChainWatch()
    watch.promoted(4, 3, BEFORE)
    watch.promoted(5, 4, BEFORE)
    saved = json.loads(json.dumps(watch.dump()))
    again = ChainWatch()
    again.resume(saved, 5)
    found, _ = feed(again, 5, 0.2, 400)
    assert isinstance(found, Regression)
    assert (found.back_to, found.refused) == (3, (4, 5))
    other = ChainWatch()
    other.resume(saved, 6)
    assert other.before is None
    with pytest.raises(KeyError):
        other.resume({"members": [6]}, 6)


def test_something_put_in_between_by_hand_ends_the_chain() -> None:
    watch = ChainWatch()
    watch.promoted(1, 0, BEFORE)
    watch.promoted(3, 2, BEFORE)
    assert (watch.unconfirmed, watch.before) == ((3,), 2)
    watch.forget()
    assert watch.unconfirmed == ()


def test_false_alarms_are_rare() -> None:
    """A tenth less than before is what is still taken for noise; the trial's end asks no more than the mean."""
    alarms = 0
    for seed in range(200):
        trial = Trial(max_requests=400)
        values = shares(0.47, seed)
        while trial.state == "watching":
            trial.update(next(values), 0.5)
        alarms += trial.state == "worse"
    assert alarms <= 4


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="max_requests"):
        Trial(max_requests=0)
    with pytest.raises(ValueError, match="share"):
        Trial().update(1.5, 0.5)
