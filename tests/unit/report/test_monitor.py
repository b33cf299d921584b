"""Windows, sparkline and drift over finished requests, with a clock that the test moves."""

import numpy as np
import pytest

from adaptd.report.monitor import Finished, Monitor

K = 3


class Clock:
    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def request(domain: str, accepted: int, rounds: int = 4) -> Finished:
    return Finished(
        domain,
        accepted + rounds,
        rounds,
        rounds * K,
        accepted,
        (rounds, accepted, 0),
        (accepted, 0, 0),
        draft_version=1,
    )


def test_mal_is_tokens_by_rounds_and_acceptance_is_accepted_by_proposed() -> None:
    monitor = Monitor(K, 0.02, Clock())
    monitor.observe(request("a", 2))
    monitor.observe(request("a", 6))
    found = monitor.now("a")
    assert found["mal"] == pytest.approx((6 + 10) / 8)
    assert found["token_acceptance"] == pytest.approx(8 / 24)
    assert found["by_depth"] == [8 / 8, 0.0, None]


def test_windows_forget_what_is_older() -> None:
    clock = Clock()
    monitor = Monitor(K, 0.02, clock)
    monitor.observe(request("a", 1))
    clock.now += 2 * 3600
    monitor.observe(request("a", 1))
    assert (monitor.window(3600)["requests"], monitor.window(86400)["requests"]) == (1, 2)
    clock.now += 25 * 3600
    monitor.observe(request("a", 1))
    assert monitor.window(86400)["requests"] == 1


def test_clients_cannot_grow_the_memory_by_inventing_domains() -> None:
    monitor = Monitor(K, 0.02, Clock())
    for i in range(500):
        monitor.observe(request(f"d{i}", 1))
    assert len(monitor.status()["domains"]) <= 65
    assert monitor.status()["total"]["requests"] == 500


def test_a_change_of_mixture_is_drift_of_all_though_each_domain_stands_still() -> None:
    """Traffic that moves to a new domain has no history there: only the whole shows it."""
    rng = np.random.default_rng(0)
    monitor = Monitor(K, 0.02, Clock())
    events = [e for _ in range(200) for e in monitor.observe(request("easy", int(rng.integers(6, 11))))]
    assert not events
    events = [e for _ in range(200) for e in monitor.observe(request("hard", int(rng.integers(0, 3))))]
    assert [(e.domain, e.direction) for e in events] == [("all", "drop")]


def test_a_request_without_proposals_counts_and_does_not_divide_by_zero() -> None:
    monitor = Monitor(K, 0.02, Clock())
    monitor.observe(Finished("a", 1, 1, 0, 0, (0, 0, 0), (0, 0, 0), 0))
    assert monitor.now()["token_acceptance"] is None
    assert monitor.now()["mal"] == 1.0


def test_requests_with_other_draft_lengths_are_compared_by_what_the_full_one_would_have_given() -> None:
    """From k = 3 to k = 1: more of what is proposed is accepted, and MAL falls, though the draft is as good as before."""
    rng = np.random.default_rng(1)
    monitor = Monitor(K, 0.02, Clock())

    def play(k: int) -> Finished:
        hits = rng.random((30, K)) < 0.6
        full = hits.cumprod(1).sum(1)
        played = np.minimum(full, k)
        # What the engine knows of the rounds cut short: 0.6 + 0.36 more on average.
        share = float((played + np.where((played == k) & (k < K), 0.96, 0.0)).sum() / (30 * K))
        counts = (int(played.sum()) + 30, 30, 30 * k, int(played.sum()))
        return Finished("a", *counts, (30,), (int((played > 0).sum()),), 1, share if k < K else None)

    events = [event for _ in range(150) for event in monitor.observe(play(3))]
    before = monitor.windows()["a"].mean
    events += [event for _ in range(150) for event in monitor.observe(play(1))]
    assert not events
    assert monitor.windows()["a"].mean == pytest.approx(before, abs=0.03)
    found = monitor.now("a")
    assert found["draft_length"] == 1.0
    assert found["token_acceptance"] == pytest.approx(0.6, abs=0.05)


def test_a_request_without_a_draft_says_nothing_about_it() -> None:
    monitor = Monitor(K, 0.02, Clock())
    for _ in range(20):
        monitor.observe(request("a", 6))
        monitor.observe(Finished("a", 30, 30, 0, 0, (0, 0, 0), (0, 0, 0), 1))
    assert monitor.windows()["a"].mean == pytest.approx(0.5)
