"""The report of a period, from a series and traces that were made up: what is compared, tested and drawn."""

from __future__ import annotations

import asyncio
import base64
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adaptd.app.reporting import report
from adaptd.app.trending import Trending
from adaptd.config import load
from adaptd.errors import BufferAway
from adaptd.report.monitor import Finished
from adaptd.report.period import period_report
from buffers.errors import TableUnavailable
from buffers.memory_series import MemorySeries
from buffers.memory_table import MemoryTable
from buffers.synthetic import synthetic_trace
from buffers.table import TableLimits

START = 1_700_000_100.0
HOUR = 3600.0
LIMITS = TableLimits(max_bytes=10**9, ttl_s=None, anchors=4, reserved_max_bytes=10**7)
#: What the made-up traffic consists of.
TOKENS = np.arange(260, 330)


class Clock:
    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> float:
        return self.now


def trace(rng: np.random.Generator, at: float, acceptance: float) -> Any:
    source = np.where(rng.random(48) < acceptance, 1, 0).astype(np.uint8)
    tokens = rng.choice(TOKENS, 64).astype(np.uint32)
    rejected_at = np.flatnonzero(source == 0).astype(np.int32)
    rejected = np.full(48, -1, np.int32)
    rejected[rejected_at] = rng.choice(TOKENS, len(rejected_at))
    return synthetic_trace(
        rng,
        tokens=tokens,
        source=source,
        rejected=rejected,
        rejected_at=rejected_at,
        draft_topk_ids=np.zeros((len(rejected_at), 8), np.uint32),
        draft_topk_logprobs=np.full((len(rejected_at), 8), -3, np.float16),
        created_at=at,
        domain="math",
    )


class Deployment:
    """Two days of traffic in which version 1 comes after 24 hours; acceptance rises from 30 % to 60 %."""

    def __init__(self, home: Path) -> None:
        self.clock = Clock()
        self.table = MemoryTable("d", LIMITS, self.clock)
        self.trending = Trending(load(None, [f"state_dir={home}", "trends.traces=1000"]), self.clock)
        self.trending.connect(MemorySeries(8, self.clock), self.table)
        rng = np.random.default_rng(0)
        asyncio.run(self.trending.write())
        for hour in range(48):
            self.clock.now = START + hour * HOUR
            good = 0.6 if hour >= 24 else 0.3
            if hour == 24:
                self.trending.remember("drift", self.clock.now - 3 * HOUR, DRIFT)
                self.trending.remember("promoted", self.clock.now, {"version": 1, "gain": GAIN})
                self.trending.remember("rejected", self.clock.now + 5 * HOUR, {"reason": "no gain <b>", "gain": GAIN})
            for domain, worse in (("math", 0.0), ("code", 0.1)):
                taken = np.minimum.accumulate(rng.random((25, 4)) < good - worse, axis=1).sum(0).tolist()
                n = sum(taken)
                reached = (25, *taken[:3])
                self.trending.observe(Finished(domain, 25 + n, 25, 100, n, reached, tuple(taken), 0))
            self.table.insert([trace(rng, self.clock.now, good) for _ in range(4)], [1.0] * 4)
            asyncio.run(self.trending.write())

    def report(self, since: str = "7d", baseline: Any = "first") -> dict[str, Any]:
        about = {"deployment": "d", "engine": "native", "k": 4, "draft_version": 1}
        return asyncio.run(report(self.trending, self.table, since, baseline, 500, about))


DRIFT = {"domain": "math", "direction": "down", "before": 0.5, "after": 0.3}
GAIN = {"mean": 0.3, "low": 0.2, "high": 0.4}


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Deployment:
    return Deployment(tmp_path_factory.mktemp("home"))


def test_the_first_third_is_compared_with_the_last(deployment: Deployment) -> None:
    found = deployment.report()
    assert found["split"]["before"] < START + 24 * HOUR < found["split"]["after"]
    assert found["before"]["math"]["token_acceptance"] < found["after"]["math"]["token_acceptance"]
    n = found["before"]["all"]["rounds"] + found["after"]["all"]["rounds"]
    assert 0.6 < n / found["trends"]["summary"]["all"]["rounds"] < 0.75
    # The page begins with the first traffic, not a week ago.
    assert START - 900 <= found["trends"]["from"] <= START


def test_day_0_ends_with_the_first_promotion(deployment: Deployment) -> None:
    found = deployment.report(baseline="day0")
    assert found["split"]["after"] == START + 24 * HOUR
    assert START + 23 * HOUR < found["split"]["before"] < START + 24 * HOUR
    late = deployment.report(since="20h", baseline="day0")
    assert late["split"] is None
    assert "--baseline first" in late["why_not_compared"]


def test_tokens_are_their_own_controls(deployment: Deployment) -> None:
    tokens = deployment.report()["tokens"]
    test = tokens["all"]["test"]
    assert test["pairs"] == len(TOKENS)
    assert test["difference"] == pytest.approx(-0.3, abs=0.05)
    assert test["p"] < 1e-6
    groups = tokens["by_group"].values()
    assert sum(g["test"]["pairs"] for g in groups) == len(TOKENS)
    assert all(g["test"]["p_holm"] >= g["test"]["p"] for g in groups if g["test"]["p"] is not None)
    rate = tokens["all"]["before"]["rate"]
    assert rate == pytest.approx(0.7, abs=0.03)
    top = tokens["top_wanted"][0]
    assert 0 < top["rejected"] <= top["judged"]
    assert len(tokens["top_proposed"]) == 20


def test_the_page_holds_its_figures_and_escapes_what_it_was_told(deployment: Deployment, tmp_path: Path) -> None:
    for baseline in ("first", "day0"):
        page, *images = period_report(deployment.report(baseline=baseline), tmp_path)
        text = page.read_text()
        held = [base64.b64decode(data) for data in re.findall(r"base64,([^\"]+)", text)]
        assert held == [image.read_bytes() for image in images]
        assert all(image.startswith(b"\x89PNG") for image in held)
        assert "no gain &lt;b&gt;" in text
        assert not re.search(r"(src|href)=\"(?!data:)", text)
        for heading in (
            "By domain",
            "by target entropy",
            "Rejections by token group",
            "Tokens rejected most",
            "Events",
        ):
            assert heading in text


def test_a_period_without_traffic_says_so_on_its_page(tmp_path: Path) -> None:
    clock = Clock()
    table = MemoryTable("d", LIMITS, clock)
    trending = Trending(load(None, [f"state_dir={tmp_path}"]), clock)
    trending.connect(MemorySeries(8, clock), table)
    about = {"deployment": "d", "engine": "native", "k": 4, "draft_version": 0}
    found = asyncio.run(report(trending, table, "7d", "first", 500, about))
    page = period_report(found, tmp_path)[0].read_text()
    assert "the period holds no traffic" in page
    trending.observe(Finished("math", 10, 5, 20, 5, (5, 3, 1, 0), (3, 1, 1, 0), 0))
    found = asyncio.run(report(trending, table, "7d", "first", 500, about))
    assert "one bucket" in found["why_not_compared"]
    page = period_report(found, tmp_path)[0].read_text()
    assert "2.00" in page


def test_a_store_that_is_away_is_a_refusal_to_ask_again(tmp_path: Path) -> None:
    class Gone(MemorySeries):
        def read(self, since: float, until: float | None = None) -> Any:
            raise TableUnavailable("redis is gone")

    clock = Clock()
    trending = Trending(load(None, [f"state_dir={tmp_path}"]), clock)
    table = MemoryTable("d", LIMITS, clock)
    trending.connect(Gone(8, clock), table)
    with pytest.raises(BufferAway, match="gone"):
        asyncio.run(report(trending, table, "7d", "first", 500, {}))
