"""The one contract of all replay tables, on three backends: memory, embedded Redis, standalone Redis.

The standalone server is $ADAPTD_TEST_REDIS_URL, or a `redis-server` from PATH started here on a random loopback port.
Where there is neither, its tests are skipped; with both CI and ADAPTD_REQUIRE_REDIS set they fail instead. Every table
has a random deployment name and only its own keys are deleted.
"""

import os
import shutil
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import numpy as np
import pytest
from numpy.typing import NDArray
from redis import Redis
from scipy import stats

from buffers.codec import encode
from buffers.connection import connect
from buffers.embedded import start_embedded
from buffers.errors import TableUnavailable
from buffers.memory_table import MemoryTable
from buffers.redis_table import RedisTable
from buffers.synthetic import synthetic_trace
from buffers.table import NO_KEY, STRATA, Key, ReplaySample, ReplayTable, TableInfo, TableLimits
from buffers.trace import Trace

Table = MemoryTable | RedisTable
ROOMY = TableLimits(max_bytes=50_000_000, ttl_s=None, anchors=50, reserved_max_bytes=10_000_000)
START = 1_700_000_000.0


class Clock:
    """Unix seconds that stand still until told."""

    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> float:
        return self.now


class Backend:
    """Makes tables on one store and deletes exactly what they stored."""

    def __init__(self, url: str | None) -> None:
        self.url = url
        self._redis_tables: list[RedisTable] = []

    def table(self, limits: TableLimits = ROOMY, clock: Callable[[], float] | None = None, salt: str = "seed") -> Table:
        """A table of a random deployment. The salt seeds the reservoir, and the still clock fixes the first key."""
        name = f"test-{uuid4().hex}"
        if self.url is None:
            return MemoryTable(name, limits, clock or Clock(), salt)
        table = RedisTable(self.url, name, limits, clock or Clock(), salt)
        self._redis_tables.append(table)
        return table

    def damage(self, table: Table, key: Key, payload: bytes) -> None:
        """Replaces what is stored under a key, behind the table's back."""
        if isinstance(table, MemoryTable):
            record = table._state.records[key]
            record.row = record.row._replace(payload=payload)
            return
        client = self.client()
        client.hset(table.keys[1], str(key), payload)  # type: ignore[arg-type]  # bytes are a value like any other
        client.close()

    def client(self) -> Redis:
        assert self.url is not None
        return connect(self.url)

    def clean(self) -> None:
        for table in self._redis_tables:
            client = self.client()
            client.unlink(*table.keys)
            client.close()
            table.close()


@pytest.fixture(scope="module")
def embedded_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    server = start_embedded(tmp_path_factory.mktemp("embedded"))
    yield server.url
    server.close()


@pytest.fixture(scope="module")
def standalone_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if url := os.environ.get("ADAPTD_TEST_REDIS_URL"):
        yield url
        return
    binary = shutil.which("redis-server")
    if binary is None:
        reason = "no redis-server on PATH and ADAPTD_TEST_REDIS_URL is not set"
        if os.environ.get("CI") and os.environ.get("ADAPTD_REQUIRE_REDIS"):
            pytest.fail(reason)
        pytest.skip(reason)
    yield from _standalone(binary, tmp_path_factory.mktemp("standalone"))


def _standalone(binary: str, directory: Path) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--port", str(port), "--bind", "127.0.0.1", "--dir", str(directory), "--save", "", "--daemonize", "no"]
    with subprocess.Popen([binary, *options], stdout=subprocess.DEVNULL) as server:
        url = f"redis://127.0.0.1:{port}/0"
        for _ in range(200):
            try:
                connect(url).close()
                break
            except TableUnavailable:
                time.sleep(0.05)
        yield url
        server.terminate()


@pytest.fixture(
    params=[
        "memory",
        pytest.param("embedded", marks=pytest.mark.redis),
        pytest.param("standalone", marks=pytest.mark.redis),
    ],
)
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    url = None if request.param == "memory" else request.getfixturevalue(f"{request.param}_url")
    backend = Backend(url)
    yield backend
    backend.clean()


# --- helpers ----------------------------------------------------------------------------------------------------------

RNG = np.random.default_rng(20261122)
SMALL = synthetic_trace(RNG, n_prompt=2, n_response=4, n_top=3, n_draft_top=2, draft_version=1000)
SIZE = len(encode(SMALL))


def traces(n: int, **overrides: object) -> list[Trace]:
    """n small traces of equal size; `draft_version` numbers them."""
    return [replace(SMALL, draft_version=1000 + i, **overrides) for i in range(n)]


def limits(traces_kept: float, **overrides: object) -> TableLimits:
    """Limits with room for so many small traces."""
    return replace(ROOMY, max_bytes=int(traces_kept * SIZE), **overrides)


def proportional(
    priorities: NDArray[np.float64], n: int, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    share = priorities / priorities.sum()
    chosen = rng.choice(len(priorities), n, replace=False, p=share)
    return chosen, share[chosen]


def numbers(samples: list[ReplaySample]) -> list[int]:
    return [sample.trace.draft_version - 1000 for sample in samples]


def fill(table: ReplayTable, n: int, **overrides: object) -> list[Key]:
    return table.insert(traces(n, **overrides), [1.0] * n)


# --- insert and sample ------------------------------------------------------------------------------------------------


def test_what_is_inserted_comes_back_bit_for_bit(backend: Backend) -> None:
    table = backend.table()
    trace = synthetic_trace(RNG, request_id="r-1", domain="math/gsm8k ü", tenant="t", surprise=0.25)
    (key,) = table.insert([trace], [2.5])
    (sample,) = table.all("recent")
    assert sample.info == (key, 1.0, 2.5, 0, 1, "recent")
    assert encode(sample.trace) == encode(trace)


def test_keys_grow_with_insertion_over_all_chunks(backend: Backend) -> None:
    keys = fill(backend.table(), 150)
    assert len(keys) == 150
    assert keys == sorted(set(keys))
    assert min(keys) > NO_KEY


def test_wrong_arguments_store_nothing_and_are_named(backend: Backend) -> None:
    table = backend.table()
    good = traces(2)
    with pytest.raises(ValueError, match=r"priorities \(1\) must be as many as traces \(2\)"):
        table.insert(good, [1.0])
    for priority in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="priority"):
            table.insert(good, [1.0, priority])
        with pytest.raises(ValueError, match="priority"):
            table.update_priorities({1: priority})
    with pytest.raises(ValueError, match="prompt_len"):
        table.insert([good[0], replace(good[1], prompt_len=0)], [1.0, 1.0])
    with pytest.raises(ValueError, match="stratum"):
        table.sample(1, proportional, RNG, "nowhere")  # type: ignore[arg-type]
    assert table.info().inserted_total == 0


def test_an_empty_table_gives_nothing_and_says_so(backend: Backend) -> None:
    table = backend.table()
    assert table.insert([], []) == []
    for stratum in STRATA:
        assert not table.can_sample(1, stratum)
        assert table.sample(3, proportional, RNG, stratum) == []
        assert table.all(stratum) == []
    assert table.fresh(NO_KEY, 5) == []
    assert table.info() == TableInfo(
        sizes=dict.fromkeys(STRATA, 0), bytes=dict.fromkeys(STRATA, 0), stored_bytes=0,
        by_domain={s: {} for s in STRATA}, inserted_total=0, evicted_total=0, expired_total=0, sampled_total=0,
        refused_total={}, newest_key=NO_KEY,
    )  # fmt: skip


def test_can_sample_is_true_exactly_up_to_the_size(backend: Backend) -> None:
    table = backend.table()
    fill(table, 5)
    assert [table.can_sample(n) for n in (0, 5, 6)] == [True, True, False]


def test_a_sample_says_how_it_was_drawn(backend: Backend) -> None:
    table = backend.table()
    keys = table.insert(traces(4), [1.0, 2.0, 3.0, 4.0])
    first = table.sample(4, proportional, np.random.default_rng(0))
    again = table.sample(2, proportional, np.random.default_rng(0))
    for sample in first:
        number = numbers([sample])[0]
        expected = (keys[number], pytest.approx((number + 1) / 10), number + 1.0, 1, 4, "recent")
        assert tuple(sample.info) == expected
    assert [s.info.times_sampled for s in again] == [2, 2]
    assert table.info().sampled_total == 6


def test_priorities_decide_the_draw(backend: Backend) -> None:
    """2,000 draws of one in two traces at 9 to 1: 1,800 expected, standard deviation 13.4; p < 1e-4 beyond four."""
    table = backend.table()
    table.insert(traces(2), [9.0, 1.0])

    def with_replacement(
        priorities: NDArray[np.float64], n: int, rng: np.random.Generator
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        share = priorities / priorities.sum()
        chosen = rng.choice(len(priorities), 1000, p=share)
        return chosen, share[chosen]

    rng = np.random.default_rng(5)
    drawn = Counter(n for _ in range(2) for n in numbers(table.sample(1, with_replacement, rng)))
    assert abs(drawn[0] - 1800) < 4 * 13.4
    assert drawn.total() == 2000


def test_more_than_there_is_gives_what_there_is(backend: Backend) -> None:
    table = backend.table()
    fill(table, 3)
    assert sorted(numbers(table.sample(10, proportional, RNG))) == [0, 1, 2]


def test_sampling_reads_the_index_once_and_only_the_chosen_payloads(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading every payload to draw a few would move gigabytes a learner step."""
    table = backend.table()
    fill(table, 100)
    index, read = table._index, table._read
    calls: list[object] = []
    monkeypatch.setattr(table, "_index", lambda stratum: calls.append("index") or index(stratum))
    monkeypatch.setattr(table, "_read", lambda s, keys, count: calls.append(len(keys)) or read(s, keys, count=count))
    assert len(table.sample(7, proportional, RNG)) == 7
    assert calls == ["index", 7]


def test_the_same_seed_draws_the_same_traces(backend: Backend) -> None:
    table = backend.table()
    fill(table, 30)
    draws = [numbers(table.sample(8, proportional, np.random.default_rng(3))) for _ in range(2)]
    assert draws[0] == draws[1]


def test_fresh_gives_the_newest_in_order_after_a_key(backend: Backend) -> None:
    table = backend.table()
    keys = fill(table, 10)
    assert numbers(table.fresh(NO_KEY, 3)) == [7, 8, 9]
    assert numbers(table.fresh(keys[4], 100)) == [5, 6, 7, 8, 9]
    assert table.fresh(keys[-1], 100) == []
    assert table.fresh(NO_KEY, 0) == []


def test_all_is_ordered_limited_and_not_sampling(backend: Backend) -> None:
    table = backend.table()
    fill(table, 100)
    assert numbers(table.all("recent")) == list(range(100))
    assert numbers(table.all("recent", 2)) == [98, 99]
    some = table.all("anchors", 10)
    assert len(some) == 10
    assert {s.info.key for s in some} < {s.info.key for s in table.all("anchors")}
    assert table.all("anchors", 0) == []
    keys = [s.info.key for s in table.all("recent")]
    assert [s.info.key for s in table.all("recent", 5, keys[97])] == keys[98:]
    assert table.all("recent", None, keys[-1]) == []
    assert table.info().sampled_total == 0


def test_a_spread_goes_from_the_oldest_to_the_newest_and_is_not_sampling(backend: Backend) -> None:
    table = backend.table()
    fill(table, 100)
    assert numbers(table.spread("recent", 4)) == [0, 33, 66, 99]
    assert numbers(table.spread("recent", 200)) == list(range(100))
    assert len(table.spread("anchors", 7)) == 7
    assert table.spread("recent", 0) == table.spread("reserved", 5) == []
    assert table.info().sampled_total == 0


# --- priorities and removal -------------------------------------------------------------------------------------------


def test_priorities_change_in_every_stratum_and_unknown_keys_are_ignored(backend: Backend) -> None:
    table = backend.table()
    keys = fill(table, 5)
    assert table.update_priorities({keys[1]: 7.5, keys[2]: 1e-9, 999: 3.0}) == 2
    for stratum in ("recent", "anchors"):
        assert [s.info.priority for s in table.all(stratum)] == [1.0, 7.5, 1e-9, 1.0, 1.0]


def test_removal_is_from_every_stratum_and_unknown_keys_are_ignored(backend: Backend) -> None:
    table = backend.table()
    keys = fill(table, 5)
    assert table.remove([keys[0], keys[3], 999, keys[0]]) == 2
    assert table.remove([]) == 0
    assert numbers(table.all("recent")) == numbers(table.all("anchors")) == [1, 2, 4]
    assert sorted(numbers(table.sample(3, proportional, RNG))) == [1, 2, 4]


# --- budgets and time -------------------------------------------------------------------------------------------------


def test_the_oldest_leave_when_the_byte_budget_is_full(backend: Backend) -> None:
    table = backend.table(limits(10, anchors=0))
    fill(table, 25)
    info = table.info()
    assert numbers(table.all("recent")) == list(range(15, 25))
    assert (info.inserted_total, info.evicted_total) == (25, 15)
    assert info.stored_bytes == info.bytes["recent"] == sum(len(encode(s.trace)) for s in table.all("recent"))


def test_the_budget_holds_after_every_insert_whatever_the_sizes(backend: Backend) -> None:
    table = backend.table(limits(12, anchors=4, reserved_max_bytes=6 * SIZE))
    rng = np.random.default_rng(8)
    for _ in range(12):
        lengths = rng.integers(1, 40, 9)
        table.insert(
            [synthetic_trace(rng, n_response=int(n), n_top=3, reserved=bool(n % 3 == 0)) for n in lengths], [1.0] * 9
        )
        info = table.info()
        held = {s.info.key: len(encode(s.trace)) for t in ("recent", "anchors") for s in table.all(t)}
        assert info.stored_bytes == sum(held.values()) <= 12 * SIZE
        assert info.bytes["reserved"] == sum(len(encode(s.trace)) for s in table.all("reserved")) <= 6 * SIZE
        assert info.bytes["anchors"] <= 6 * SIZE


def test_a_smaller_budget_takes_hold_although_it_needs_many_calls(backend: Backend) -> None:
    """One atomic call removes at most 500 traces, so that it never holds the server for long."""
    table = backend.table(replace(ROOMY, anchors=0))
    fill(table, 1100)
    table.limits = limits(20, anchors=0)
    fill(table, 1)
    info = table.info()
    assert info.sizes["recent"] == 20
    assert info.evicted_total == 1081


def test_a_trace_beyond_half_the_budget_is_refused_and_counted(backend: Backend) -> None:
    table = backend.table(limits(4))
    large = synthetic_trace(RNG, n_response=400)
    small = traces(1)[0]
    keys = table.insert([small, large, replace(small, reserved=True)], [1.0] * 3)
    assert keys[1] == NO_KEY
    assert keys[0] < keys[2]
    assert table.info().refused_total == {"too_large": 1}
    assert table.info().inserted_total == 2


def test_recent_and_reserved_expire_and_anchors_do_not(backend: Backend) -> None:
    clock = Clock()
    table = backend.table(replace(ROOMY, ttl_s=60.0), clock)
    fill(table, 3)
    fill(table, 2, reserved=True)
    clock.now += 59
    fill(table, 1)
    assert table.info().sizes == {"recent": 4, "anchors": 4, "reserved": 2}
    clock.now += 1
    assert not table.can_sample(2)
    assert len(table.sample(9, proportional, RNG)) == 1
    assert table.info().sizes == {"recent": 1, "anchors": 4, "reserved": 0}
    assert table.info().expired_total == 5
    assert len(table.all("anchors")) == 4


# --- strata -----------------------------------------------------------------------------------------------------------


def test_reserved_traces_are_in_their_stratum_only(backend: Backend) -> None:
    table = backend.table(replace(ROOMY, reserved_max_bytes=3 * SIZE + 50))
    table.insert([t for pair in zip(traces(6), traces(6, reserved=True), strict=True) for t in pair], [1.0] * 12)
    assert not any(s.trace.reserved for stratum in ("recent", "anchors") for s in table.all(stratum))
    assert all(s.trace.reserved for s in table.all("reserved"))
    assert numbers(table.all("reserved")) == [3, 4, 5]  # its own budget, oldest first
    assert table.info().sizes == {"recent": 6, "anchors": 6, "reserved": 3}
    assert not any(s.trace.reserved for s in table.fresh(NO_KEY, 100))


def test_an_anchor_outlives_its_eviction_from_recent(backend: Backend) -> None:
    table = backend.table(limits(12, anchors=5))
    fill(table, 80)
    recent = set(numbers(table.all("recent")))
    anchors = table.all("anchors")
    assert len(anchors) == 5
    gone = [s for s in anchors if numbers([s])[0] not in recent]
    assert gone, "seeded: some anchor must have left recent for this test to mean anything"
    assert encode(gone[0].trace) == encode(traces(80)[numbers(gone)[0]])
    assert len(table.sample(5, proportional, RNG, "anchors")) == 5


def test_a_trace_turned_out_of_the_anchors_stays_in_recent(backend: Backend) -> None:
    table = backend.table(replace(ROOMY, anchors=2))
    fill(table, 30)
    assert numbers(table.all("recent")) == list(range(30))
    assert table.info().sizes["anchors"] == 2
    assert len(table.sample(30, proportional, RNG)) == 30


def uniformity(counts: NDArray[np.int64], repetitions: int, kept: int) -> float:
    """p value of: each of n positions was kept with the same probability, `kept` of them in each repetition.

    Inclusions of one repetition exclude each other, with covariance -p(1-p)/(n-1); scaled by (n-1)/n the sum of squared
    standardised counts is chi-square with n-1 degrees of freedom.
    """
    n = len(counts)
    share = kept / n
    chi2 = ((counts - repetitions * share) ** 2).sum() / (repetitions * share * (1 - share)) * (n - 1) / n
    return float(stats.chi2.sf(chi2, n - 1))


def test_anchors_are_uniform_over_everything_ever_seen(backend: Backend) -> None:
    """60 streams of 30, 8 kept of each, at fixed salts; p > 0.01. Recent holds only 18, so many anchors outlive it."""
    counts = np.zeros(30, np.int64)
    for repetition in range(60):
        table = backend.table(limits(18, anchors=8), salt=f"uniform-{repetition}")
        fill(table, 30)
        kept = numbers(table.all("anchors"))
        assert len(kept) == 8
        counts[kept] += 1
    assert uniformity(counts, 60, 8) > 0.01

    latest = np.zeros(30, np.int64)
    latest[22:] = 60
    assert uniformity(latest, 60, 8) < 1e-9, "the statistic must catch a table that keeps the latest"


def test_anchors_of_one_long_stream_spread_over_all_of_it(backend: Backend) -> None:
    """1,000 traces, 100 kept: Kolmogorov-Smirnov against the uniform distribution, fixed salt, p > 0.01."""
    table = backend.table(limits(250, anchors=100), salt="long-stream")
    keys = fill(table, 1000)
    place = {key: i / 1000 for i, key in enumerate(keys)}
    kept = [place[s.info.key] for s in table.all("anchors")]
    assert len(kept) == 100
    assert stats.kstest(kept, "uniform").pvalue > 0.01
    assert stats.kstest([0.9 + k / 10 for k in kept], "uniform").pvalue < 1e-9


def test_anchors_never_take_more_than_half_the_budget(backend: Backend) -> None:
    table = backend.table(limits(20, anchors=1000))
    fill(table, 60)
    info = table.info()
    assert info.bytes["anchors"] <= 10 * SIZE
    assert info.sizes["anchors"] >= 8
    assert info.sizes["recent"] >= 10


def test_the_gap_left_by_a_removed_anchor_is_not_filled_by_favouring_late_traces(backend: Backend) -> None:
    """Admitting any late trace while there is room would bias the reservoir: only low enough lots may enter."""
    table = backend.table(replace(ROOMY, anchors=20), salt="gap")
    fill(table, 400)
    table.remove([s.info.key for s in table.all("anchors")])
    fill(table, 40)
    # 5 % of the lots are low enough: 2 of 40 expected, and 8 or more has p < 0.001.
    assert table.info().sizes["anchors"] < 8


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_unreadable_payloads_are_skipped_counted_by_reason_and_removed(backend: Backend) -> None:
    table = backend.table()
    keys = fill(table, 12)
    payload = encode(traces(1)[0])
    flipped = payload[:-1] + bytes([payload[-1] ^ 1])
    backend.damage(table, keys[0], payload[:100])
    backend.damage(table, keys[1], flipped)
    backend.damage(table, keys[2], b"\x80\x04\x95 a pickle from elsewhere")
    samples = table.sample(12, proportional, RNG)
    assert sorted(numbers(samples)) == list(range(3, 12))
    info = table.info()
    assert info.refused_total == {"truncated": 1, "corrupt": 1, "schema": 1}
    assert info.sizes == {"recent": 9, "anchors": 9, "reserved": 0}
    assert info.stored_bytes == sum(len(encode(s.trace)) for s in table.all("recent"))


def test_unreadable_payloads_are_replaced_by_other_draws(backend: Backend) -> None:
    table = backend.table()
    keys = table.insert(traces(10), [1e6] * 4 + [1.0] * 6)
    for key in keys[:4]:  # certain to be drawn first
        backend.damage(table, key, b"")
    samples = table.sample(4, proportional, np.random.default_rng(0))
    assert len(samples) == len(set(numbers(samples))) == 4
    assert min(numbers(samples)) >= 4
    assert table.info().refused_total == {"truncated": 4}


@pytest.mark.parametrize("read", ["fresh", "all"])
def test_reading_in_order_passes_over_unreadable_payloads(backend: Backend, read: str) -> None:
    table = backend.table()
    keys = fill(table, 4)
    backend.damage(table, keys[1], b"rubbish")
    samples = table.fresh(NO_KEY, 10) if read == "fresh" else table.all("recent")
    assert numbers(samples) == [0, 2, 3]
    assert sum(table.info().refused_total.values()) == 1


def test_traces_that_vanish_between_choosing_and_reading_are_replaced(backend: Backend) -> None:
    table = backend.table()
    keys = fill(table, 10)
    raced: list[Key] = []

    def racing(
        priorities: NDArray[np.float64], n: int, rng: np.random.Generator
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        chosen = np.arange(n)
        if not raced:  # another process evicts, after the index was read
            raced.extend(keys[:3])
            table.remove(raced)
        return chosen, np.full(n, 1 / len(priorities))

    samples = table.sample(4, racing, RNG)
    assert len({s.info.key for s in samples}) == 4
    assert not {s.info.key for s in samples} & set(raced)
    assert table.info().refused_total == {}


def test_if_everything_vanishes_the_sample_is_short_and_nothing_is_raised(backend: Backend) -> None:
    table = backend.table()
    keys = fill(table, 5)

    def racing(
        priorities: NDArray[np.float64], n: int, rng: np.random.Generator
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        table.remove(keys[:4])
        return proportional(priorities, n, rng)

    assert len(table.sample(3, racing, RNG)) <= 1
    assert table.info().sizes["recent"] == 1


# --- provenance and upkeep --------------------------------------------------------------------------------------------


def test_domains_are_counted_in_every_stratum(backend: Backend) -> None:
    table = backend.table(limits(40, anchors=5))
    fill(table, 30, domain="math")
    fill(table, 30, domain="tools/bfcl")
    fill(table, 2, domain="math", reserved=True)
    info = table.info()
    for stratum in STRATA:
        assert info.by_domain[stratum] == Counter(s.trace.domain for s in table.all(stratum))
        assert sum(info.by_domain[stratum].values()) == info.sizes[stratum]
    assert info.by_domain["reserved"] == {"math": 2}


def test_a_new_target_ages_out_the_traces_of_the_old_and_the_reservoir_starts_anew(backend: Backend) -> None:
    table = backend.table(replace(ROOMY, anchors=10))
    fill(table, 300, target_id="old")
    fill(table, 5, target_id="old", reserved=True)
    fill(table, 30, target_id="new")
    assert table.age_out("new") == 305
    assert all(s.trace.target_id == "new" for stratum in STRATA for s in table.all(stratum))
    # Left as it was, the reservoir would admit 3 % of the new target's traces.
    assert table.info().sizes == {"recent": 30, "anchors": 10, "reserved": 0}
    assert table.age_out("new") == 0


def test_reset_forgets_everything_but_how_far_keys_have_come(backend: Backend) -> None:
    table = backend.table(limits(10))
    keys = fill(table, 20)
    fill(table, 2, reserved=True)
    table.sample(2, proportional, RNG)
    table.reset()
    info = table.info()
    assert set(info.sizes.values()) == set(info.bytes.values()) == {0}
    assert (info.inserted_total, info.evicted_total, info.sampled_total, info.stored_bytes) == (0, 0, 0, 0)
    assert min(fill(table, 3)) > max(keys)
    assert table.info().sizes == {"recent": 3, "anchors": 3, "reserved": 0}


def test_deployments_do_not_see_each_other(backend: Backend) -> None:
    one, other = backend.table(), backend.table()
    fill(one, 4)
    fill(other, 2)
    other.reset()
    assert one.info().sizes["recent"] == 4
    assert other.info().sizes["recent"] == 0


def test_writers_and_learners_in_many_threads_keep_the_books_straight(backend: Backend) -> None:
    table = backend.table(limits(30, anchors=8, reserved_max_bytes=5 * SIZE))
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        try:
            for _ in range(15):
                table.insert([*traces(3), replace(traces(1)[0], reserved=True)], [1.0] * 4)
                drawn = table.sample(4, proportional, rng) + table.sample(2, proportional, rng, "anchors")
                table.update_priorities({s.info.key: 2.0 for s in drawn})
                table.remove([s.info.key for s in drawn[:1]])
        except BaseException as exc:
            failures.append(exc)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    info = table.info()
    held = {s.info.key: len(encode(s.trace)) for t in ("recent", "anchors") for s in table.all(t)}
    assert info.inserted_total == 4 * 15 * 4
    assert info.stored_bytes == sum(held.values()) <= 30 * SIZE
    for stratum in STRATA:
        assert info.sizes[stratum] == len(table.all(stratum))
        assert info.bytes[stratum] == sum(len(encode(s.trace)) for s in table.all(stratum))
    assert info.refused_total == {}


def random_trace(rng: np.random.Generator) -> Trace:
    return synthetic_trace(
        rng,
        n_response=int(rng.integers(1, 30)),
        n_top=2,
        n_draft_top=1,
        domain=str(rng.choice(["a", "b"])),
        target_id=str(rng.choice(["x", "y"], p=[0.9, 0.1])),
        reserved=bool(rng.random() < 0.2),
    )


def test_every_backend_does_what_the_memory_table_does(backend: Backend) -> None:
    """120 random operations side by side: same keys, same strata, same counts, same draws."""
    small = limits(20, anchors=6, reserved_max_bytes=4 * SIZE, ttl_s=12.0)
    clock = Clock()
    table, model = backend.table(small, clock), MemoryTable("model", small, clock, "seed")
    rng = np.random.default_rng(99)
    keys: list[Key] = []
    for step in range(120):
        operation, seed = rng.integers(7), int(rng.integers(1 << 30))
        some = [keys[i] for i in np.random.default_rng(seed).integers(0, len(keys), 4)] if keys else []
        results: list[object] = []
        for each in (table, model):
            local = np.random.default_rng(seed)
            if operation <= 2:
                batch = [random_trace(local) for _ in range(5)]
                results.append(each.insert(batch, local.uniform(0.1, 2.0, 5).tolist()))
            elif operation == 3:
                # Index order is the store's own affair, so the draw is compared through what a full draw holds.
                drawn = each.sample(1000, proportional, local, STRATA[seed % 3])
                results.append(sorted((s.info.key, s.info.priority, s.info.times_sampled) for s in drawn))
            elif operation == 4:
                results.append(each.update_priorities({k: 0.5 + k % 7 for k in some}))
            elif operation == 5:
                results.append(each.remove(some))
            else:
                results.append(each.age_out("x") if seed % 3 == 0 else [s.info for s in each.all("anchors", 3)])
        assert results[0] == results[1], (step, operation)
        if operation <= 2:
            keys += results[0]  # type: ignore[operator]
        clock.now += float(rng.uniform(0, 4))
        assert table.info() == model.info(), (step, operation)
    assert model.info().expired_total > 0, "the run must reach every way out of the table"
    assert model.info().evicted_total > 0
