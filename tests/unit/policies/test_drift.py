"""Drift per domain: found soon, in the right direction, rarely without cause, and across a restart."""

from __future__ import annotations

import json

import numpy as np
import pytest

from policies.drift import RECENT_VALUES, DriftDetector, DriftEvent


def shares(mean: float, count: int, rng: np.random.Generator) -> list[float]:
    """Acceptance shares of requests: Beta with the given mean and a standard deviation of about 0.16."""
    return [float(value) for value in rng.beta(8 * mean, 8 * (1 - mean), count)]


def feed(detector: DriftDetector, domain: str, values: list[float]) -> list[DriftEvent]:
    return [event for value in values if (event := detector.update(domain, value)) is not None]


def test_a_stationary_stream_of_500_requests_raises_no_drift_in_60_seeds() -> None:
    """At a true rate of 5 % this would pass with probability 0.046."""
    alarms = sum(bool(feed(DriftDetector(), "math", shares(0.5, 500, np.random.default_rng(s)))) for s in range(60))
    assert alarms == 0


def test_a_fall_from_one_half_to_one_quarter_is_found_within_forty_requests() -> None:
    delays = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        detector = DriftDetector()
        assert not feed(detector, "math", shares(0.5, 200, rng))
        (event, *_) = feed(detector, "math", shares(0.25, 150, rng))
        assert event.direction == "drop"
        assert event.before == pytest.approx(0.5, abs=0.1)
        delays.append(event.n - 200)
    assert np.median(delays) <= 24
    assert max(delays) <= 40


def test_the_event_comes_at_the_same_request_for_the_same_stream_with_the_means_of_both_sides() -> None:
    rng = np.random.default_rng(7)
    events = feed(DriftDetector(), "math", shares(0.6, 200, rng) + shares(0.2, 200, rng))
    assert [(event.domain, event.direction, event.n, event.width) for event in events] == [("math", "drop", 212, 12)]
    assert events[0].before == pytest.approx(0.6, abs=0.03)
    assert events[0].after == pytest.approx(0.2, abs=0.06)


def test_one_abrupt_change_is_reported_once_in_nearly_every_stream() -> None:
    """ADWIN by itself gives up the old in small pieces: one shift of traffic would start a learning tick several times."""
    counts = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        counts.append(len(feed(DriftDetector(), "math", shares(0.6, 200, rng) + shares(0.3, 300, rng))))
    assert min(counts) == 1
    assert counts.count(1) >= 38


def test_recovery_is_drift_too_with_the_other_direction() -> None:
    rng = np.random.default_rng(3)
    detector = DriftDetector()
    events = feed(detector, "math", shares(0.6, 200, rng) + shares(0.2, 300, rng) + shares(0.6, 300, rng))
    assert {event.direction for event in events if event.n <= 500} == {"drop"}
    assert {event.direction for event in events if event.n > 500} == {"rise"}


def test_domains_do_not_touch_each_other() -> None:
    """One detector over all traffic would see every change of the mix as drift."""
    rng = np.random.default_rng(4)
    detector = DriftDetector()
    for high, low in zip(shares(0.8, 300, rng), shares(0.1, 300, rng), strict=True):
        assert detector.update("medical", high) is None
        assert detector.update("math", low) is None
    state = detector.state()
    assert state["medical"]["mean"] == pytest.approx(0.8, abs=0.05)
    assert state["math"] == {"mean": pytest.approx(0.1, abs=0.05), "n": 300, "drifted_at": None}


def test_nothing_is_said_during_the_warm_up() -> None:
    assert feed(DriftDetector(warmup=100), "math", [1.0] * 50 + [0.0] * 49) == []
    assert feed(DriftDetector(warmup=20), "math", [1.0] * 50 + [0.0] * 49) != []


def test_after_a_drift_the_mean_is_that_of_the_newer_requests_not_lost() -> None:
    """river forgets everything at the next update; the status page would then show the mean of one request."""
    detector = DriftDetector()
    values = [0.9, 0.8] * 100 + [0.1, 0.2] * 50
    event = next(event for value in values if (event := detector.update("math", value)) is not None)
    state = detector.state()["math"]
    assert state["drifted_at"] == event.n
    assert state["mean"] == pytest.approx(event.after, abs=0.02)
    detector.update("math", 0.15)
    assert detector.state()["math"]["mean"] == pytest.approx(event.after, abs=0.1)


def test_a_snapshot_survives_json_and_the_drift_is_found_after_the_restart() -> None:
    rng = np.random.default_rng(5)
    before = DriftDetector()
    feed(before, "math", shares(0.6, 200, rng))
    feed(before, "tools", [])
    after = DriftDetector()
    after.restore(json.loads(json.dumps(before.snapshot())))
    assert after.state()["math"]["n"] == 200
    assert after.state()["math"]["mean"] == pytest.approx(before.state()["math"]["mean"], abs=1e-3)
    (event, *_) = feed(after, "math", shares(0.2, 100, rng))
    assert event.direction == "drop"
    assert event.n < 300


def test_a_snapshot_stays_small_on_a_long_stream() -> None:
    detector = DriftDetector()
    feed(detector, "math", shares(0.5, 3 * RECENT_VALUES, np.random.default_rng(6)))
    snapshot = detector.snapshot()
    assert len(snapshot["math"]["recent"]) <= RECENT_VALUES
    assert len(json.dumps(snapshot)) < 8 * RECENT_VALUES + 200


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_a_value_that_is_no_share_is_refused_and_changes_nothing(value: float) -> None:
    detector = DriftDetector()
    with pytest.raises(ValueError, match="acceptance share"):
        detector.update("math", value)
    assert detector.state() == {}


@pytest.mark.parametrize("summary", [{}, {"n": 1, "drifted_at": None, "recent": [2.0]}, {"n": "x", "recent": []}])
def test_a_foreign_snapshot_is_refused_and_the_state_is_kept(summary: dict[str, object]) -> None:
    detector = DriftDetector()
    detector.update("math", 0.5)
    with pytest.raises(ValueError, match="'math'"):
        detector.restore({"math": summary})
    assert detector.state()["math"]["n"] == 1


def test_bad_settings_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"delta \(0.0\)"):
        DriftDetector(delta=0.0)
    with pytest.raises(ValueError, match=r"warmup \(0\)"):
        DriftDetector(warmup=0)


def test_detections_of_a_seeded_stream_are_exact() -> None:
    """0.50 for 400 requests, 0.25 for 300, 0.60 for 300: found 24 and 15 requests after the switches, at their very place.

    Any change of the detector or of river's shows here.
    """
    rng = np.random.default_rng(11)
    values = shares(0.5, 400, rng) + shares(0.25, 300, rng) + shares(0.6, 300, rng)
    found = [(e.n, e.direction, e.n - e.width) for e in feed(DriftDetector(), "math", values)]
    assert found == [(424, "drop", 399), (715, "rise", 700)]
