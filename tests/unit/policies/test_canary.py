"""One server first, the rest once it is confirmed; what was rolled back stays out, with its descendants."""

import pytest

from policies.canary import Canary, Quarantine

THREE = ["a", "b", "c"]


def test_the_first_server_takes_what_is_not_settled_and_the_others_follow() -> None:
    canary = Canary(THREE)
    assert canary.wanted(THREE, 1, 0) == {"a": 1, "b": 0, "c": 0}
    assert canary.wanted(THREE, 1, 1) == {"a": 1, "b": 1, "c": 1}
    assert canary.wanted(THREE, 3, 2) == {"a": 3, "b": 2, "c": 2}


def test_another_one_takes_over_while_the_canary_cannot_and_stays_it() -> None:
    canary = Canary(THREE)
    assert canary.wanted(["b", "c"], 1, 0) == {"a": 0, "b": 1, "c": 0}
    assert canary.wanted(THREE, 1, 0)["b"] == 1, "what it has served so far is of one server"
    assert canary.canary == "b"
    assert canary.wanted([], 1, 0)["b"] == 1
    assert canary.wanted(["a"], 1, 0) == {"a": 1, "b": 0, "c": 0}


def test_one_server_alone_is_its_own_canary() -> None:
    assert Canary(["a"]).wanted(["a"], 4, 2) == {"a": 4}


def test_what_was_learned_from_a_quarantined_version_is_quarantined_too() -> None:
    quarantine = Quarantine()
    quarantine.add(3, "acceptance fell")
    parents = {1: None, 2: 1, 3: 2, 4: 3, 5: 4, 6: 2}
    assert [v for v in parents if quarantine.refusal(v, parents)] == [3, 4, 5]
    assert "comes from version 3" in quarantine.refusal(5, parents)


def test_a_new_number_does_not_clear_tensors_that_were_refused() -> None:
    quarantine = Quarantine()
    quarantine.add(3, "acceptance fell")
    assert quarantine.refusal(7, {7: 2}, restored=3)
    assert not quarantine.refusal(7, {7: 2}, restored=2)


def test_day_0_is_always_the_way_back() -> None:
    with pytest.raises(ValueError, match="day 0"):
        Quarantine().add(0, "no")
    assert Quarantine().refusal(0, {}) == ""


@pytest.mark.parametrize("servers", [[], ["a", "a"]])
def test_bad_arguments_are_refused(servers: list[str]) -> None:
    with pytest.raises(ValueError, match="at least one name"):
        Canary(servers)


def test_a_quarantine_goes_on_after_a_restart_and_can_be_lifted_with_what_it_came_from() -> None:
    first = Quarantine()
    first.add(3, "acceptance fell")
    first.add(5, "again")
    parents = {3: 2, 4: 3, 5: 4}
    second = Quarantine(first.reasons)
    assert second.refusal(5, parents)
    assert second.lift(5, parents) == [5, 3]
    assert not any(second.refusal(v, parents) for v in (3, 4, 5))
    assert second.lift(5, parents) == []
