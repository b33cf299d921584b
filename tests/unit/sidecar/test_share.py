"""How much is captured: a simulated server that capture slows down, by a cost that the governor is not told."""

import math
import random
from itertools import pairwise

import pytest

from adaptd.sidecar.share import BUDGET, LEARNER, LIMIT, MAX_COST, CaptureShare, CostMeter, Ticket


class Server:
    """Requests of 4 s one after another on each of `slots` places; capture of any slows all by `cost`."""

    def __init__(self, share: CaptureShare, now: list[float], slots: int, cost: float, seed: int = 0) -> None:
        self.share, self.now, self.slots, self.cost = share, now, slots, cost
        self.rng = random.Random(seed)
        self.requests = self.captured = 0
        self.work = self.seconds = self.slowed = 0.0

    def run(self, seconds: float, gap: float = 0.0, step: float = 0.05) -> "Server":
        """`gap` seconds without a request follow each."""
        places: list[list[float]] = [[self.rng.random() * 4, 0.0, 1.0] for _ in range(self.slots)]
        tickets: list[Ticket | None] = [None] * self.slots
        end = self.now[0] + seconds
        while self.now[0] < end:
            any_captured = any(t is not None and t.captured for t in tickets)
            speed = 1.0 - self.cost if any_captured else 1.0
            for i, place in enumerate(places):
                ticket = tickets[i]
                if ticket is None:
                    place[0] -= step
                    if place[0] <= 0:
                        ticket = tickets[i] = self.share.begin(self.share.why_not() is None)
                        place[1], place[2] = 4.0, math.exp(self.rng.gauss(0, 0.2))
                        self.requests += 1
                        self.captured += ticket.captured
                    continue
                done = speed * step * place[2]
                self.work, self.seconds = self.work + speed * step, self.seconds + step
                place[1] -= done
                if place[1] <= 0:
                    self.share.end(ticket, 96)
                    tickets[i], place[0] = None, gap
            self.now[0] += step
        for ticket in tickets:
            if ticket is not None:
                self.share.end(ticket, 0)
        return self

    @property
    def lost(self) -> float:
        """Part of the speed that capture has cost."""
        return 1.0 - self.work / self.seconds


def governor(now: list[float], *, limit: float = 1.0, budget: float = 0.02, useful: float = 1e9) -> CaptureShare:
    return CaptureShare(limit, budget, useful, 60.0, random.Random(1).random, lambda: now[0])


@pytest.mark.parametrize("cost", [0.05, 0.15, 0.3])
@pytest.mark.parametrize("slots", [1, 16])
def test_a_server_without_a_moment_to_spare_loses_no_more_than_the_budget(cost: float, slots: int) -> None:
    now = [0.0]
    share = governor(now)
    Server(share, now, slots, cost).run(600)  # to learn what it costs
    settled = Server(share, now, slots, cost).run(1200)
    assert settled.lost <= 0.03, "the cost is an estimate"
    assert settled.captured > 0.2 * (0.02 / cost) * settled.requests, "the budget is used"
    assert share.status()["bound_by"] == BUDGET
    assert 0 < share.status()["in_force"] < 1


def test_an_idle_server_is_captured_whole() -> None:
    now = [0.0]
    share = governor(now)
    server = Server(share, now, 1, 0.1).run(1200, gap=40.0)
    assert server.captured == server.requests
    assert share.status()["in_force"] == 1.0
    assert share.status()["bound_by"] is None


def test_where_capture_costs_nothing_nearly_all_is_captured_at_any_load() -> None:
    now = [0.0]
    share = governor(now)
    Server(share, now, 16, 0.0).run(1200)
    server = Server(share, now, 16, 0.0).run(1200)
    assert server.captured > 0.6 * server.requests


def test_captured_requests_come_together_because_one_costs_as_much_as_all() -> None:
    now = [0.0]
    share = governor(now)
    decisions = []
    why_not = share.why_not
    share.why_not = lambda: decisions.append(why_not()) or decisions[-1]  # type: ignore[method-assign, func-returns-value]
    Server(share, now, 8, 0.15).run(900)
    turns = sum(a != b for a, b in pairwise(decisions))
    assert turns < 0.1 * len(decisions)


def test_no_more_is_captured_than_the_learner_can_use() -> None:
    now = [0.0]
    share = governor(now, budget=1.0, useful=30)
    server = Server(share, now, 8, 0.0).run(600)
    assert server.captured == pytest.approx(30 * 600 / 60 + 30, rel=0.1)
    assert share.status()["bound_by"] == LEARNER


def test_the_limit_is_a_share_and_a_budget_of_one_is_none() -> None:
    now = [0.0]
    share = governor(now, limit=0.25, budget=1.0)
    server = Server(share, now, 8, 0.5).run(2000)
    assert server.captured == pytest.approx(0.25 * server.requests, rel=0.15)
    assert share.status()["bound_by"] == LIMIT


def test_a_budget_of_zero_captures_nothing() -> None:
    now = [0.0]
    assert not Server(governor(now, budget=0.0), now, 4, 0.1).run(100).captured


def test_a_request_that_came_to_nothing_says_nothing_of_cost_and_is_over() -> None:
    now = [0.0]
    share = governor(now)
    before = share.meter.cost(1)
    for _ in range(100):
        ticket = share.begin(True)
        now[0] += 10
        share.end(ticket, 0)
    assert share.meter.cost(1) == before
    assert share.why_not() == BUDGET, "the time counts all the same"


def test_whatever_is_measured_a_part_of_the_time_is_captured() -> None:
    """Something else is slow whenever it is captured: what it takes for capture's cost is more than that can be."""
    now = [0.0]
    share = governor(now)
    Server(share, now, 8, 0.6).run(600)
    assert share.meter.cost(8) == MAX_COST
    settled = Server(share, now, 8, 0.6).run(1800)
    assert settled.captured
    assert 0.03 < settled.lost <= 0.06, "the budget, as often as its estimate is below what it costs"


def test_what_it_costs_is_told_apart_by_load() -> None:
    meter, rng = CostMeter(), random.Random(0)
    for i in range(3000):
        on = i % 2
        meter.add(0.01 * math.exp(rng.gauss(0, 0.2)) / (1 - 0.02 * on), on, 1)
        meter.add(0.05 * math.exp(rng.gauss(0, 0.2)) / (1 - 0.3 * on), on, 20)
    assert meter.cost(1) == pytest.approx(0.02, abs=0.02)
    assert meter.cost(20) == pytest.approx(0.3, abs=0.03)
