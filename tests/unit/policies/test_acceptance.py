"""The renewal recursion against enumeration, against hand counts, and against real speculative sampling."""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import astuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.acceptance import (
    Profile,
    accept_probability,
    acceptance_profile,
    acceptance_profiles,
    expected_rounds,
    mal,
)


def decode(outcomes: tuple[bool, ...], k: int) -> dict[str, list[float]]:
    """Play the rounds of a decoder that stops at the text's end, given what would be accepted at each position."""
    counts = {"rounds": [0.0], "proposed": [0.0], "full": [0.0], "reached": [0.0] * k, "accepted_at": [0.0] * k}
    t, end = 0, len(outcomes)
    while t < end:
        counts["rounds"][0] += 1
        counts["proposed"][0] += min(k, end - t)
        for depth in range(k):
            if t >= end:
                break
            counts["reached"][depth] += 1
            if not outcomes[t]:
                break
            counts["accepted_at"][depth] += 1
            t += 1
        else:
            counts["full"][0] += 1
        t += 1  # the correction or the bonus
    return counts


def by_enumeration(accept: list[float], k: int) -> Profile:
    """Every pattern of acceptances with its probability, played one by one: exact, exponential, obvious."""
    total = {"rounds": [0.0], "proposed": [0.0], "full": [0.0], "reached": [0.0] * k, "accepted_at": [0.0] * k}
    for outcomes in itertools.product([False, True], repeat=len(accept)):
        chance = math.prod(a if hit else 1.0 - a for a, hit in zip(accept, outcomes, strict=True))
        for name, values in decode(outcomes, k).items():
            total[name] = [old + chance * new for old, new in zip(total[name], values, strict=True)]
    return Profile(
        emitted=float(len(accept)),
        rounds=total["rounds"][0],
        accepted=sum(total["accepted_at"]),
        proposed=total["proposed"][0],
        reached=tuple(total["reached"]),
        accepted_at=tuple(total["accepted_at"]),
        full_blocks=total["full"][0],
    )


def flat(profile: Profile) -> list[float]:
    return list(itertools.chain.from_iterable(x if isinstance(x, tuple) else (x,) for x in astuple(profile)))


@given(accept=st.lists(st.floats(0.0, 1.0), max_size=7), k=st.integers(1, 5))
@settings(max_examples=120, deadline=None, derandomize=True)
def test_every_count_equals_the_enumeration_of_all_outcomes(accept: list[float], k: int) -> None:
    assert flat(acceptance_profile(accept, k)) == pytest.approx(flat(by_enumeration(accept, k)), abs=1e-9)


def test_hand_counted_greedy_text() -> None:
    """k = 2: [accept, accept, bonus], [accept, correction], [accept, end of text]."""
    profile = acceptance_profile([1, 1, 0, 1, 0, 1], k=2)
    assert profile == Profile(6.0, 3.0, 4.0, 5.0, (3.0, 2.0), (3.0, 1.0), 1.0)


@pytest.mark.parametrize(
    ("accept", "k", "rounds"),
    [([0.0] * 10, 4, 10.0), ([1.0] * 10, 4, 2.0), ([1.0] * 11, 4, 3.0), ([], 4, 0.0), ([0.3], 4, 1.0)],
)
def test_extremes(accept: list[float], k: int, rounds: float) -> None:
    assert expected_rounds(accept, k) == pytest.approx(rounds)


def test_a_long_text_of_constant_acceptance_has_the_closed_form_length() -> None:
    """(1 - a^(k+1)) / (1 - a), Leviathan et al. 2023, equation 1; the cut last round costs less than k / R."""
    a, k = 0.6, 4
    profile = acceptance_profile([a] * 20_000, k)
    assert mal([profile]) == pytest.approx((1 - a ** (k + 1)) / (1 - a), rel=3e-4)
    assert profile.accepted / profile.rounds + 1 == pytest.approx(mal([profile]), rel=3e-4)
    by_depth = [hit / reached for hit, reached in zip(profile.accepted_at, profile.reached, strict=True)]
    assert by_depth == pytest.approx([a] * k)
    assert profile.full_blocks / profile.rounds == pytest.approx(a**k, rel=1e-3)


@given(accept=st.lists(st.floats(0.0, 1.0), min_size=1, max_size=40), k=st.integers(1, 6))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_counts_are_consistent_with_each_other(accept: list[float], k: int) -> None:
    profile = acceptance_profile(accept, k)
    slack = 1e-9
    assert len(accept) / (k + 1) - slack <= profile.rounds <= len(accept) + slack
    assert profile.reached[0] == pytest.approx(profile.rounds)
    assert profile.emitted <= profile.rounds + profile.accepted + slack
    assert profile.accepted <= sum(profile.reached) + slack <= profile.proposed + 2 * slack
    for i in range(k):
        assert profile.accepted_at[i] <= profile.reached[i] + slack
        if i + 1 < k:
            assert profile.reached[i + 1] <= profile.accepted_at[i] + slack


def test_a_batch_of_uneven_lengths_equals_its_texts_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding must neither lend a short text rounds nor mix the order; the small budget forces several groups."""
    monkeypatch.setattr("policies.acceptance.BATCH_ELEMENTS", 2_000)
    rng = np.random.default_rng(0)
    texts = [rng.random(int(length)) for length in [30, 0, 7, 1, 64, 30, 200]]
    together = acceptance_profiles(texts, k=3)
    for text, profile in zip(texts, together, strict=True):
        assert flat(profile) == pytest.approx(flat(acceptance_profile(text, 3)))
        assert profile.emitted == len(text)


def speculative_rounds(p: np.ndarray, q: np.ndarray, k: int, length: int, rng: np.random.Generator) -> int:
    """Rounds that real speculative sampling needs for `length` tokens of an order-1 chain; rows are contexts."""
    vocab, context, emitted, rounds = p.shape[0], 0, 0, 0
    while emitted < length:
        rounds += 1
        state = context
        for _ in range(k):
            x = int(rng.choice(vocab, p=q[state]))
            if rng.random() >= min(1.0, p[state, x] / q[state, x]):
                residual = np.maximum(p[state] - q[state], 0.0)
                x = int(rng.choice(vocab, p=residual / residual.sum()))
                state, emitted = x, emitted + 1
                break
            state, emitted = x, emitted + 1
        else:
            state, emitted = int(rng.choice(vocab, p=p[state])), emitted + 1
        context = state
    return rounds


def test_the_expectation_over_the_targets_texts_is_what_speculative_sampling_needs() -> None:
    """The shortcut itself: texts from p alone, scored with min(1, q/p), against rounds really played. |z| < 4."""
    rng = np.random.default_rng(1)
    p, q = rng.dirichlet(np.ones(4), size=4), rng.dirichlet(np.ones(4), size=4)
    k, length, draws = 3, 20, 600
    played = np.array([speculative_rounds(p, q, k, length, rng) for _ in range(draws)], dtype=float)
    texts = []
    for _ in range(draws):
        context, ratios = 0, []
        for _ in range(length):
            x = int(rng.choice(4, p=p[context]))
            ratios.append((math.log(q[context, x]), math.log(p[context, x])))
            context = x
        columns = np.array(ratios)
        texts.append(accept_probability(columns[:, 0], columns[:, 1]))
    scored = np.array([profile.rounds for profile in acceptance_profiles(texts, k)])
    error = math.sqrt(played.var(ddof=1) / draws + scored.var(ddof=1) / draws)
    assert abs(played.mean() - scored.mean()) < 4 * error
    assert error < 0.02 * played.mean()
    # Given the text nothing is left to chance but the draft, so the score varies less than the play.
    assert scored.var() < played.var()


def test_five_hundred_traces_of_a_hundred_tokens_are_scored_well_under_a_second() -> None:
    texts = list(np.random.default_rng(0).random((500, 100)))
    acceptance_profiles(texts[:2], k=4)
    start = time.process_time()
    acceptance_profiles(texts, k=4)
    assert time.process_time() - start < 0.5


def test_accept_probability_is_the_ratio_capped_at_one() -> None:
    q = np.log(np.array([0.1, 0.5, 0.3], dtype=np.float64))
    p = np.log(np.array([0.4, 0.25, 0.3], dtype=np.float64))
    np.testing.assert_allclose(accept_probability(q, p), [0.25, 1.0, 1.0])
    assert accept_probability([-np.inf], [-1.0])[0] == 0.0


def test_mal_is_a_ratio_of_sums_not_a_mean_of_ratios() -> None:
    all_kept, none_kept = acceptance_profile([1.0] * 5, k=4), acceptance_profile([0.0] * 5, k=4)
    assert mal([all_kept, none_kept]) == pytest.approx(10 / 6)


@pytest.mark.parametrize("bad", [[1.5], [-0.1], [float("nan")], [[0.5]]])
def test_acceptance_outside_its_range_is_refused(bad: list[float]) -> None:
    with pytest.raises(ValueError, match="accept"):
        acceptance_profile(bad, k=2)


def test_other_bad_arguments_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"k \(0\)"):
        expected_rounds([0.5], 0)
    with pytest.raises(ValueError, match=r"1 NaN.*leave"):
        accept_probability([float("nan")], [0.0])
    with pytest.raises(ValueError, match="probability 0"):
        accept_probability([-1.0], [-np.inf])
    with pytest.raises(ValueError, match="one shape"):
        accept_probability([-1.0], [-1.0, -1.0])
    with pytest.raises(ValueError, match="0 rounds"):
        mal([])
