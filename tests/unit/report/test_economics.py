"""Whether speculation pays, from figures as the decoders and a server's metrics give them."""

from typing import Any

import pytest

from adaptd.report.economics import behind_proxy, line, native
from adaptd.sidecar.load import Load

NOW = {"mal": 2.5, "by_depth": [0.7, 0.6, 0.5]}


def decoder(round_s: float | None, draft_s: float = 0.1, verify_s: float = 1.2, batch: int = 1) -> dict[str, Any]:
    costs = [{"batch": batch, "k": 3, "draft_s": draft_s, "target_s": 1.0, "verify_s": verify_s}]
    return {"engine": {"round_s": round_s, "round_batch": batch if round_s else None}, "costs": costs}


def test_the_formula_and_the_rounds_stand_side_by_side() -> None:
    found = native([decoder(2.0)], NOW)
    assert found["expected"] == pytest.approx(2.5 / (1 + 3 * 0.1 + 0.2))
    assert found["measured"] == pytest.approx(1.25)
    assert found["break_even_mal"] == pytest.approx(1.5)
    assert found["pays"]
    assert "measured 1.25x" in line(found)


def test_where_it_does_not_pay_it_is_said_by_how_much() -> None:
    found = native([decoder(5.0)], NOW)
    assert (found["pays"], found["speedup"]) == (False, 0.5)
    assert "does not pay" in line(found)
    assert "2.00 times as fast without it" in line(found)


def test_before_the_first_round_the_formula_alone_decides_and_names_a_better_depth() -> None:
    found = native([decoder(None, draft_s=0.9, verify_s=1.9)], NOW)
    assert found["measured"] is None
    assert found["pays"] is False
    assert (found["best_k"], found["best_expected"]) == (0, 1.0)
    assert "k = 0 would give 1.00x" in line(found)


def test_costs_are_those_of_the_present_batch() -> None:
    both = decoder(2.0, batch=1)
    both["costs"] += decoder(None, verify_s=3.0, batch=8)["costs"]
    both["engine"]["round_batch"] = 7.0
    assert native([both], NOW)["c_v"] == pytest.approx(2.0)
    both["costs"].pop()
    assert native([both], NOW)["measured"] is None, "a round of 7 is not set against a step of 1"


def test_what_is_not_known_is_said() -> None:
    assert native([], NOW)["reason"] == "no decoder is up"
    idle = native([decoder(None)], {"mal": None, "by_depth": [None] * 3})
    assert idle["pays"] is None
    assert idle["c_d"] == pytest.approx(0.1)
    assert line(idle).startswith("unknown: no requests yet")
    assert "upstream.plain_tokens_per_s" in line(behind_proxy(Load(0.05, 2.0, 4.0, 900), None, 4))
    assert "too few requests" in line(behind_proxy(None, 40.0, 4))


def test_behind_a_proxy_the_rate_without_speculation_decides() -> None:
    """A round of 50 ms that emits two tokens is 40 tokens a second."""
    load = Load(round_s=0.05, mal=2.0, running=4.0, rounds=900)
    assert behind_proxy(load, 25.0, 4)["measured"] == pytest.approx(1.6)
    found = behind_proxy(load, 50.0, 4)
    assert (found["pays"], found["speedup"]) == (False, pytest.approx(0.8))
    assert found["break_even_mal"] == pytest.approx(2.5)


def choosing(round_s: float | None, **lengths: int) -> dict[str, Any]:
    made = decoder(round_s)
    made["engine"]["draft_lengths"] = lengths
    return made


def test_where_lengths_are_chosen_a_round_is_priced_at_their_mean() -> None:
    now = {"mal": 1.6, "by_depth": [0.7, 0.6, None], "draft_length": 1.5}
    found = native([choosing(1.4, medical=3, tools=0), choosing(1.4, medical=2)], now)
    assert found["break_even_mal"] == pytest.approx(1 + 1.5 * 0.1 + 0.1)
    assert found["expected"] == pytest.approx(1.6 / 1.25)
    assert found["draft_lengths"] == {"medical": 2.5, "tools": 0.0}
    assert found["pays"]
    assert "k medical 2.5, tools 0" in line(found)


def test_a_decoder_that_drafts_for_nobody_is_not_told_that_it_does_not_pay() -> None:
    """A plain round takes a little longer than a target step, and that is no reason for an alert."""
    found = native([choosing(1.1, tools=0)], {"mal": 1.0, "by_depth": [0.1, None, None], "draft_length": 0.0})
    assert found["pays"] is None
    assert found["break_even_mal"] == 1.0
    assert line(found).startswith("off: no domain's draft would save time")


def test_chosen_lengths_are_told_before_the_passes_are_timed() -> None:
    made = choosing(None, tools=2)
    made["costs"] = []
    assert native([made], NOW)["draft_lengths"] == {"tools": 2.0}
