"""The gate before promotion and the watch after it."""

from __future__ import annotations

import dataclasses
import json
import math
import time

import numpy as np
import pytest
from scipy import stats

from policies.floor import better_on_floor, gone, served
from policies.gate import Interval, LiveWatch, Score, judge, paired_bootstrap

LIMITS = {"min_gain": 0.01, "max_regression": 0.02, "min_traces": 20}


def scores(
    n: int, gain: float, seed: int, domain: str = "math", stratum: str = "reserved", noise: float = 0.05
) -> tuple[list[Score], list[Score]]:
    """Candidate and incumbent on n traces of very different difficulty; the candidate needs fewer rounds."""
    rng = np.random.default_rng(seed)
    candidate, incumbent = [], []
    for _ in range(n):
        emitted = float(rng.integers(30, 80))
        rounds = emitted / rng.uniform(1.1, 4.0)
        change = (1.0 + gain) * math.exp(noise * rng.normal() - noise**2 / 2)
        incumbent.append(Score(domain, stratum, emitted, rounds))
        candidate.append(Score(domain, stratum, emitted, rounds / change))
    return candidate, incumbent


def joined(*pairs: tuple[list[Score], list[Score]]) -> tuple[list[Score], list[Score]]:
    return [score for c, _ in pairs for score in c], [score for _, i in pairs for score in i]


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_the_gain_is_a_ratio_of_ratios_of_sums() -> None:
    candidate = [Score("math", "reserved", 10, 2), Score("math", "reserved", 90, 48)]
    incumbent = [Score("math", "reserved", 10, 5), Score("math", "reserved", 90, 45)]
    interval = paired_bootstrap(candidate, incumbent, rng())
    assert interval.mean == pytest.approx((100 / 50) / (100 / 50) - 1)
    assert interval.low < 0 < interval.high


def test_the_interval_is_that_of_resampling_traces_one_by_one() -> None:
    """The multinomial counts and one matrix product against the loop they stand for."""
    candidate, incumbent = scores(40, gain=0.1, seed=1, noise=0.3)
    table = np.array([(c.emitted, c.rounds, i.emitted, i.rounds) for c, i in zip(candidate, incumbent, strict=True)])
    loop_rng, gains = np.random.default_rng(5), []
    for _ in range(4_000):
        e_c, r_c, e_i, r_i = table[loop_rng.integers(0, 40, 40)].sum(0)
        gains.append((e_c / r_c) / (e_i / r_i) - 1)
    interval = paired_bootstrap(candidate, incumbent, rng(), resamples=4_000)
    width = interval.high - interval.low
    assert interval.low == pytest.approx(np.quantile(gains, 0.025), abs=0.05 * width)
    assert interval.high == pytest.approx(np.quantile(gains, 0.975), abs=0.05 * width)


def test_pairing_takes_out_the_difficulty_of_the_traces() -> None:
    """Drawing other traces for each draft would widen the interval many times and hide a gain of 3 %."""
    candidate, incumbent = scores(100, gain=0.03, seed=2)
    interval = paired_bootstrap(candidate, incumbent, rng())
    shuffled = [candidate[i] for i in np.random.default_rng(1).permutation(100)]
    unpaired = paired_bootstrap(shuffled, incumbent, rng())
    assert interval.low > 0.0
    assert unpaired.high - unpaired.low > 5 * (interval.high - interval.low)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """200 data sets of 60 traces: coverage of a 90 % interval must not be below 0.83 (binomial p < 0.002) nor be 1."""
    truth, hits = 0.05, 0
    for seed in range(200):
        candidate, incumbent = scores(60, truth, seed=1_000 + seed, noise=0.2)
        interval = paired_bootstrap(candidate, incumbent, np.random.default_rng(seed), resamples=300, level=0.9)
        # The candidate's true MAL gain: rounds shrink by E[1 / change] = exp(noise^2) / (1 + gain).
        hits += interval.low <= (1 + truth) / math.exp(0.2**2) - 1 <= interval.high
    assert 166 <= hits < 200


def test_a_single_trace_has_a_gain_but_no_interval() -> None:
    candidate, incumbent = scores(1, gain=0.5, seed=3)
    interval = paired_bootstrap(candidate, incumbent, rng())
    assert interval.mean > 0.3
    assert math.isnan(interval.low)
    assert interval.as_dict() == {"mean": interval.mean, "low": None, "high": None}


def test_a_thousand_resamples_of_two_thousand_traces_take_well_under_two_seconds() -> None:
    candidate, incumbent = scores(2_000, gain=0.1, seed=4)
    start = time.process_time()
    paired_bootstrap(candidate, incumbent, rng())
    assert time.process_time() - start < 2.0


def test_blocks_of_resamples_do_not_change_the_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    candidate, incumbent = scores(50, gain=0.1, seed=5)
    whole = paired_bootstrap(candidate, incumbent, rng())
    monkeypatch.setattr("policies.gate._RESAMPLE_ELEMENTS", 350)
    assert paired_bootstrap(candidate, incumbent, rng()) == whole


def test_a_clear_gain_without_losses_is_promoted() -> None:
    verdict = judge(*joined(scores(60, 0.15, 6), scores(40, 0.0, 7, "medical", "anchors")), **LIMITS, rng=rng())
    assert verdict.promote
    assert verdict.n == 60
    assert verdict.gain.low > 0.1
    assert set(verdict.by_domain) == {"math", "medical"}
    assert "no domain loses more than 2.0%" in verdict.reason


def test_a_gain_that_may_be_noise_is_not_promoted() -> None:
    verdict = judge(*scores(30, 0.02, 8, noise=0.3), **LIMITS, rng=rng())
    assert not verdict.promote
    assert "not surely above 1.0%" in verdict.reason


def test_a_sure_gain_below_the_least_wanted_is_not_promoted() -> None:
    verdict = judge(*scores(200, 0.008, 9, noise=0.01), **LIMITS, rng=rng())
    assert verdict.gain.low > 0.0
    assert not verdict.promote


def test_one_domain_that_loses_too_much_vetoes_and_is_named() -> None:
    verdict = judge(*joined(scores(60, 0.3, 10), scores(40, -0.1, 11, "medical", "anchors")), **LIMITS, rng=rng())
    assert not verdict.promote
    assert "lost on medical -" in verdict.reason


def test_a_reserved_domain_vetoes_as_an_anchor_does() -> None:
    verdict = judge(*joined(scores(200, 0.3, 12), scores(30, -0.1, 13, "medical")), **LIMITS, rng=rng())
    assert verdict.gain.low > 0.01
    assert not verdict.promote
    assert "medical" in verdict.reason


def test_a_loss_within_the_limit_does_not_veto() -> None:
    verdict = judge(
        *joined(scores(60, 0.3, 14), scores(80, -0.01, 15, "medical", "anchors", noise=0.01)), **LIMITS, rng=rng()
    )
    assert verdict.by_domain["medical"].mean < 0
    assert verdict.promote


def test_a_domain_with_too_few_traces_cannot_veto_and_the_reason_says_so() -> None:
    verdict = judge(*joined(scores(60, 0.3, 16), scores(5, -0.5, 17, "tools", "anchors")), **LIMITS, rng=rng())
    assert verdict.promote
    assert "too few traces to veto: tools (5)" in verdict.reason
    assert verdict.by_domain["tools"].mean < -0.3


def test_anchors_alone_never_decide_a_gain() -> None:
    """The learner trains on anchors: a gain on them is no evidence."""
    verdict = judge(*scores(500, 0.5, 18, stratum="anchors"), **LIMITS, rng=rng())
    assert not verdict.promote
    assert "only 0 of 20 reserved traces (strata given: anchors)" in verdict.reason
    json.dumps(verdict.as_dict(), allow_nan=False)


def test_no_traces_at_all_is_a_refusal_not_a_crash() -> None:
    verdict = judge([], [], **LIMITS, rng=rng())
    assert not verdict.promote
    assert verdict.n == 0


def test_the_gain_can_be_decided_by_a_stratum_of_the_callers_choice() -> None:
    pairs = joined(scores(60, 0.15, 6, stratum="recent"), scores(60, 0.0, 7, "medical", "reserved"))
    verdict = judge(*pairs, **LIMITS, rng=rng(), gain_stratum="recent")
    assert verdict.promote
    assert verdict.n == 60


def test_equal_drafts_are_hardly_ever_promoted() -> None:
    """100 pairs of equal drafts at min_gain 0: the two-sided 95 % interval lets about 2.5 % through; p(> 8) < 0.002."""
    limits = LIMITS | {"min_gain": 0.0, "max_regression": 1.0}
    promoted = 0
    for seed in range(100):
        pair = scores(60, gain=math.exp(0.2**2) - 1, seed=3_000 + seed, noise=0.2)
        promoted += judge(*pair, **limits, rng=np.random.default_rng(seed), resamples=400).promote
    assert promoted <= 8


def test_scores_that_do_not_pair_up_are_refused() -> None:
    candidate, incumbent = scores(30, 0.1, 19)
    with pytest.raises(ValueError, match="29 scores"):
        judge(candidate[:29], incumbent, **LIMITS, rng=rng())
    swapped = [*incumbent[:-1], Score("tools", "reserved", 10, 5)]
    with pytest.raises(ValueError, match="score 29 must be of one trace"):
        paired_bootstrap(candidate, swapped, rng())


@pytest.mark.parametrize(("emitted", "rounds"), [(0.0, 1.0), (5.0, 0.0), (5.0, math.nan), (math.inf, 1.0)])
def test_an_empty_trace_is_no_score(emitted: float, rounds: float) -> None:
    with pytest.raises(ValueError, match="leave empty traces out"):
        Score("math", "reserved", emitted, rounds)


@pytest.mark.parametrize(
    ("limit", "name"), [({"min_traces": 1}, "min_traces"), ({"max_regression": -0.1}, "max_regression")]
)
def test_a_limit_out_of_range_is_refused_by_name(limit: dict[str, float], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        judge(*scores(30, 0.1, 20), **(LIMITS | limit), rng=rng())


def answer(watch: LiveWatch, values: np.ndarray) -> str:
    for value in values:
        if watch.update(float(value)) != "watching":
            break
    return watch.state


def at_the_boundary(kind: str, mean: float, count: int, generator: np.random.Generator) -> np.ndarray:
    """Streams whose conditional mean is exactly `mean` at every request: the hardest case that is still fine."""
    if kind == "bernoulli":
        return (generator.random(count) < mean).astype(float)
    if kind == "beta":
        return generator.beta(4 * mean, 4 * (1 - mean), count)
    # The past decides the variance: after a low value come extreme ones. Not independent, still of that mean.
    values, extreme = np.empty(count), False
    for t in range(count):
        values[t] = float(generator.random() < mean) if extreme else generator.uniform(mean - 0.1, mean + 0.1)
        extreme = values[t] < mean
    return values


@pytest.mark.parametrize("kind", ["bernoulli", "beta", "dependent"])
def test_false_alarms_stay_below_the_stated_rate_however_often_one_looks(kind: str) -> None:
    """200 streams at the boundary, looked at after each of 400 requests, against a stated rate of 10 %.

    At that rate, more alarms than the bound of 32 have probability 0.003. Alarms must also happen:
    a watch that never speaks would pass the bound.
    """
    generator, rate, mean = np.random.default_rng(11), 0.1, 0.45
    alarms = confirms = 0
    for _ in range(200):
        watch = LiveWatch(0.5, max_drop=0.1, false_alarm=rate, false_confirm=rate)
        state = answer(watch, at_the_boundary(kind, mean, 400, generator))
        alarms += state == "worse"
        confirms += state == "confirmed"
    bound = stats.binom.isf(0.003, 200, rate)
    assert alarms <= bound
    assert confirms <= bound
    assert alarms + confirms > 0


def test_the_same_streams_fool_a_z_test_that_is_looked_at_after_each_request() -> None:
    """What the watch is for, and proof that the streams above can raise alarms at all."""
    generator, alarms = np.random.default_rng(11), 0
    for _ in range(200):
        values = at_the_boundary("bernoulli", 0.45, 400, generator)
        n = np.arange(1, 401)
        z = (values.cumsum() / n - 0.45) * np.sqrt(n / (0.45 * 0.55))
        alarms += bool((z[20:] < stats.norm.ppf(0.1)).any())
    assert alarms > 60


def test_a_draft_that_is_much_worse_is_found_within_a_hundred_requests() -> None:
    seen = []
    for seed in range(20):
        watch = LiveWatch(0.5)
        assert answer(watch, np.random.default_rng(seed).beta(1.2, 2.8, 400)) == "worse"
        seen.append(watch.seen)
    assert np.median(seen) < 100


def test_a_draft_as_good_as_before_is_confirmed_in_time() -> None:
    generator = np.random.default_rng(12)
    seen = []
    for _ in range(20):
        watch = LiveWatch(0.5, max_drop=0.2)
        assert answer(watch, generator.beta(4, 4, 1_000)) == "confirmed"
        seen.append(watch.seen)
    assert np.median(seen) < 120


def test_the_answer_is_final() -> None:
    watch = LiveWatch(0.5)
    assert answer(watch, np.zeros(100)) == "worse"
    at = watch.seen
    assert {watch.update(1.0) for _ in range(200)} == {"worse"}
    assert watch.seen == at


def test_a_change_of_traffic_is_no_alarm_when_each_request_brings_its_domains_baseline() -> None:
    """Traffic moves from a domain of acceptance 0.6 to one of 0.2; the draft is as good as ever on both."""
    generator = np.random.default_rng(13)
    mixed, plain = LiveWatch(0.6), LiveWatch(0.6)
    states = []
    for value in generator.beta(1.6, 6.4, 300):
        states.append(mixed.update(float(value), baseline=0.2))
        plain.update(float(value))
    assert "worse" not in states
    assert plain.state == "worse"


@pytest.mark.parametrize(("baseline", "value"), [(0.0, 0.0), (1.0, 1.0), (0.001, 0.0)])
def test_a_baseline_at_the_edge_neither_fails_nor_alarms_at_values_as_good(baseline: float, value: float) -> None:
    watch = LiveWatch(baseline, max_drop=0.0)
    assert "worse" not in {watch.update(value) for _ in range(500)}


@pytest.mark.parametrize("value", [-0.01, 1.01, math.nan])
def test_a_value_that_is_no_share_is_refused_and_changes_nothing(value: float) -> None:
    watch = LiveWatch(0.5)
    with pytest.raises(ValueError, match="acceptance share"):
        watch.update(value)
    assert watch.seen == 0


def test_bad_settings_of_the_watch_are_refused_by_name() -> None:
    for arguments, name in (
        ({"baseline": 1.5}, "baseline"),
        ({"baseline": 0.5, "max_drop": 1.0}, "max_drop"),
        ({"baseline": 0.5, "false_alarm": 0.0}, "false_alarm"),
    ):
        with pytest.raises(ValueError, match=name):
            LiveWatch(**arguments)


def test_an_interval_is_written_with_the_keys_of_every_result_file() -> None:
    assert Interval(0.1, 0.05, 0.15).as_dict() == {"mean": 0.1, "low": 0.05, "high": 0.15}


def floor_of(candidate: list[Score], domain: str, factor: float) -> list[Score]:
    """A draft whose MAL is `factor` times the candidate's on one domain, and half of it elsewhere."""
    return [dataclasses.replace(s, rounds=s.rounds / (factor if s.domain == domain else 0.5)) for s in candidate]


def test_losses_that_add_up_to_less_than_the_floor_are_refused() -> None:
    """1 % below the incumbent is within the limit, 4 % below day 0 is not."""
    pair = joined(scores(60, 0.3, 20), scores(80, -0.01, 21, "medical", "anchors", noise=0.01))
    assert judge(*pair, **LIMITS, rng=rng(), floor=floor_of(pair[0], "medical", 1.01)).promote
    verdict = judge(*pair, **LIMITS, rng=rng(), floor=floor_of(pair[0], "medical", 1 / 0.96))
    assert not verdict.promote
    assert "too far below the floor: medical -4.0% (limit 2.0%)" in verdict.reason


def test_a_domain_below_the_floor_that_recovers_does_not_veto() -> None:
    pair = joined(scores(60, 0.3, 20), scores(80, 0.01, 21, "medical", "anchors", noise=0.01))
    assert judge(*pair, **LIMITS, rng=rng(), floor=floor_of(pair[0], "medical", 1 / 0.9)).promote


def test_the_floor_must_score_the_same_traces() -> None:
    pair = scores(60, 0.3, 20)
    with pytest.raises(ValueError, match="must score the same traces"):
        judge(*pair, **LIMITS, rng=rng(), floor=pair[0][1:])


def test_a_sure_gain_makes_up_for_a_loss_on_other_traffic_but_not_below_the_floor() -> None:
    pair = joined(scores(60, 1.0, 6), scores(60, -0.04, 7, "tools", "guard", noise=0.0))
    assert not judge(*pair, **LIMITS, rng=rng()).promote
    traded = judge(*pair, **LIMITS, rng=rng(), exchange=0.1)
    assert traded.promote
    assert traded.losers == ("tools",), "a loser even so: the anchors' share of a batch rises"
    assert not judge(*pair, **LIMITS, rng=rng(), exchange=0.03).promote, "3 % of a doubling is not enough"
    assert not judge(*pair, **LIMITS, rng=rng(), exchange=0.1, floor=pair[1]).promote
    with pytest.raises(ValueError, match="exchange"):
        judge(*pair, **LIMITS, rng=rng(), exchange=-0.1)


def test_a_domain_is_left_to_the_floor_where_that_needs_no_more_rounds() -> None:
    def fixed(domain: str, n: int, rounds: float) -> list[Score]:
        return [Score(domain, "guard", emitted=10.0, rounds=rounds) for _ in range(n)]

    floor = [*fixed("medical", 5, 4.0), *fixed("math", 5, 8.0), *fixed("rare", 2, 4.0)]
    opened = [*fixed("medical", 5, 4.1), *fixed("math", 5, 5.0), *fixed("rare", 2, 5.0)]
    assert better_on_floor(opened, floor, (), min_traces=4) == {"medical"}, "two traces of a rare domain decide nothing"
    kept = better_on_floor(opened, floor, {"rare", "math", "absent"}, min_traces=4)
    assert kept == {"medical", "rare", "absent"}, "math is better served by the candidate"
    assert [s.rounds for s in served(opened, floor, kept)] == [4.0] * 5 + [5.0] * 5 + [4.0] * 2


def test_a_domain_whose_traffic_is_gone_may_fall_below_the_floor_but_not_far() -> None:
    """An ungated draft that wins a quarter on math for 8 % of medical, which nobody asks any more."""
    pair = joined(scores(60, 0.25, 22), scores(80, -0.08, 23, "medical", "guard", noise=0.01))
    judged = {"floor": pair[1], "exchange": 0.1, "gone_loss": 0.15}
    refused = judge(*pair, **LIMITS, rng=rng(), **judged)
    assert not refused.promote, "as long as it is asked"
    found = judge(*pair, **LIMITS, rng=rng(), **judged, gone={"medical"})
    assert found.promote
    assert "loses more than 2.4% but medical -8.0%" in found.reason
    assert found.reason.endswith("not asked any more")
    assert found.losers == (), "no anchors are wanted for it"
    sunk = judge(*pair, **LIMITS, rng=rng(), **judged | {"gone_loss": 0.05}, gone={"medical"})
    assert not sunk.promote
    assert "medical -8.0% (limit 5.0%)" in sunk.reason
    assert sunk.losers == ("medical",)
    assert not judge(*pair, **LIMITS | {"min_gain": 0.5}, rng=rng(), **judged, gone={"medical"}).promote


def test_what_was_won_on_a_domain_is_not_given_up_when_its_traffic_is_gone() -> None:
    """Tools stands half as high again as day 0: what replay keeps of it is not worth a quarter on math."""
    pair = joined(scores(60, 0.25, 24), scores(80, -0.08, 25, "tools", "guard", noise=0.01))
    floor = floor_of(pair[0], "tools", 1 / 1.5)
    verdict = judge(*pair, **LIMITS, rng=rng(), floor=floor, exchange=0.1, gone={"tools"}, gone_loss=0.15)
    assert not verdict.promote
    assert verdict.losers == ("tools",)
    with pytest.raises(ValueError, match="gone_loss"):
        judge(*pair, **LIMITS, rng=rng(), gone_loss=-0.1)


@pytest.mark.parametrize(
    ("newest_first", "found"),
    [
        (["math"] * 9 + ["medical"] * 20, {"medical"}),
        (["math"] * 5 + ["medical"] * 5, set()),  # (1/2)^5: chance
        (["math"] * 7 + ["medical"] * 7, {"medical"}),
        (["math"] * 40 + ["rare"] + ["math"] * 9, set()),  # one of fifty
        (["math", "rare"] * 10, set()),
        (["math"] * 500 + ["rare"] * 3, set()),  # three are too few to have been traffic
        (["math"] * 100 + ["tools"] * 30 + ["medical"] * 30, {"tools", "medical"}),
        (["medical"] + ["math"] * 60 + ["medical"] * 60, set()),  # it is back
        ([], set()),
    ],
)
def test_a_domain_is_gone_when_chance_does_not_explain_its_absence(newest_first: list[str], found: set[str]) -> None:
    assert gone(newest_first) == found
