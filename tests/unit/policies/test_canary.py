"""One server first, the rest once nothing is worse; what was rolled back stays out, with its descendants."""

import numpy as np
import pytest

from policies.canary import Action, Canary, Quarantine

THREE = ["a", "b", "c"]


def feed(canary: Canary, server: str, mean: float, n: int, baseline: float = 0.5, seed: int = 0) -> list[Action]:
    """Requests of a server until the machine acts."""
    rng = np.random.default_rng(seed)
    for share in rng.binomial(20, mean, size=n) / 20:
        if actions := canary.observe(server, float(share), baseline):
            return actions
    return []


def test_a_good_version_goes_to_one_server_and_then_to_the_others() -> None:
    canary = Canary(THREE)
    assert canary.offer(1, 0.5, {}) == [Action("install", "a", 1)]
    assert canary.installed("a", 1) == []
    assert canary.phase == "trying"
    assert feed(canary, "a", 0.6, 400) == [Action("install", "b", 1), Action("install", "c", 1)]
    assert canary.versions == {"a": 1, "b": 0, "c": 0}
    canary.installed("b", 1)
    assert canary.phase == "spreading"
    canary.installed("c", 1)
    assert (canary.phase, set(canary.versions.values())) == ("idle", {1})


def test_a_bad_version_is_rolled_back_within_few_requests_and_reaches_no_other_server() -> None:
    canary = Canary(THREE)
    canary.offer(1, 0.5, {})
    canary.installed("a", 1)
    assert feed(canary, "a", 0.3, 100) == [Action("roll_back", "a", 0)]
    assert "rolled back on a" in canary.verdict
    assert canary.quarantine.refusal(1, {1: None})
    assert (canary.versions["b"], canary.phase) == (0, "idle")


def test_a_trial_ends_after_its_bound_even_where_nothing_is_certain() -> None:
    """At exactly the tested mean neither answer may ever come: the trial must end all the same."""
    for mean, kind in ((0.44, "roll_back"), (0.46, "install")):
        canary = Canary(["a", "b"], max_requests=50)
        canary.offer(1, 0.5, {})
        canary.installed("a", 1)
        answers = [canary.observe("a", mean, 0.5) for _ in range(50)]
        assert not any(answers[:49])
        assert [action.kind for action in answers[49]] == [kind]


def test_requests_of_other_servers_and_before_the_installation_do_not_count() -> None:
    canary = Canary(THREE)
    canary.offer(1, 0.5, {})
    assert feed(canary, "a", 0.0, 500) == []
    canary.installed("a", 1)
    assert feed(canary, "b", 0.0, 500) == []
    assert canary.phase == "trying"


def test_only_the_newest_version_waits_while_another_is_tried() -> None:
    canary = Canary(THREE)
    canary.offer(1, 0.5, {})
    canary.installed("a", 1)
    assert canary.offer(2, 0.5, {}) == canary.offer(3, 0.6, {}) == []
    assert feed(canary, "a", 0.2, 100) == [Action("roll_back", "a", 0), Action("install", "a", 3)]


def test_a_waiting_version_that_was_learned_from_a_refused_one_is_refused_at_its_turn() -> None:
    canary = Canary(THREE)
    canary.offer(1, 0.5, {})
    canary.installed("a", 1)
    canary.offer(2, 0.5, {2: 1})
    assert feed(canary, "a", 0.2, 100) == [Action("roll_back", "a", 0)]
    assert "version 2 is quarantined: it comes from version 1" in canary.verdict


def test_a_canary_that_cannot_be_installed_ends_the_trial() -> None:
    canary = Canary(THREE)
    canary.offer(1, 0.5, {})
    assert canary.failed("a", 1) == []
    assert canary.phase == "idle"
    assert not canary.quarantine.refusal(1, {}), "a server's trouble says nothing of the version"
    assert canary.offer(2, 0.5, {}) == [Action("install", "a", 2)]


def test_a_server_that_cannot_follow_is_left_behind() -> None:
    canary = Canary(["a", "b"])
    canary.offer(1, 0.5, {})
    canary.installed("a", 1)
    assert feed(canary, "a", 0.6, 400) == [Action("install", "b", 1)]
    canary.failed("b", 1)
    assert (canary.phase, canary.versions) == ("idle", {"a": 1, "b": 0})


def test_one_server_alone_is_its_own_canary() -> None:
    canary = Canary(["a"])
    canary.offer(1, 0.5, {})
    canary.installed("a", 1)
    assert feed(canary, "a", 0.6, 400) == []
    assert canary.phase == "idle"
    assert "confirmed" in canary.verdict


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


@pytest.mark.parametrize(("servers", "options"), [([], {}), (["a", "a"], {}), (["a"], {"max_requests": 0})])
def test_bad_arguments_are_refused(servers: list[str], options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be at least"):
        Canary(servers, **options)


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
