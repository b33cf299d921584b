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
