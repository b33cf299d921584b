"""Versions written as update files by an actor of their own."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from safetensors.torch import load_file

from adaptd.actors.parts import load_draft
from adaptd.app.publishing import build_publisher, remote_writer, reserved_prompts
from adaptd.config import Config, load
from adaptd.errors import ConfigError, PublishFailed
from buffers.errors import TableUnavailable
from buffers.open import open_table
from buffers.synthetic import synthetic_trace
from checkpoints.store import CheckpointStore

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    home = tmp_path_factory.mktemp("state")
    return load(None, [f"state_dir={home}", "adapt.gated=false", "adapt.head_rank=0", "adapt.embed_rank=0"])


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def test_the_actor_writes_a_version_and_says_why_it_cannot(config: Config, tmp_path: Path) -> None:
    draft, identity = load_draft(config, "cpu", "float32", serving=False)
    tensors = {name: tensor + 0.01 for name, tensor in draft.state().items()}
    about: dict[str, Any] = {"gate": {"gain": {"mean": 0.2, "low": 0.1, "high": 0.3}}, "window": {}, "config": {}}
    CheckpointStore(config.home / "checkpoints").publish(
        tensors,
        base_id=identity.base_id,
        tokenizer_hash=identity.tokenizer_hash,
        scope=identity.scope,
        scope_config=identity.scope_config,
        **about,
    )
    write = remote_writer(config, tmp_path)

    async def work() -> None:
        update = await write(1)
        sent, day_0 = load_file(update.file.path), load_file((await write(0)).file.path)
        assert (update.version, update.promise.low, update.file.tensors) == (1, 0.1, len(sent))
        assert sent.keys() == day_0.keys()
        assert not any("embed" in name or "head" in name for name in sent)
        down = "model.layers.0.mlp.down_proj.weight"
        assert not day_0[down][:, -config.adapt.width :].any()
        torch.testing.assert_close(
            sent[down][:, -config.adapt.width :].float(), torch.full((192, 128), 0.01), atol=1e-4, rtol=0
        )
        with pytest.raises(PublishFailed, match="version 7 is not in") as failed:
            await write(7)
        assert failed.value.reason == "checkpoint"

    asyncio.run(work())


def test_a_server_that_others_reach_is_refused_unless_that_is_allowed(config: Config) -> None:
    with pytest.raises(ConfigError, match="have no key"):
        build_publisher(config, "http://10.0.0.7:8000")
    assert build_publisher(config, "http://10.0.0.7:8000", allow_remote=True).version is None


def test_probe_prompts_are_those_of_the_newest_reserved_traces() -> None:
    table = open_table("memory://", "d", max_bytes=2**24, reserved_max_bytes=2**24, ttl_s=None, anchors=8)
    rng = np.random.default_rng(0)
    traces = [synthetic_trace(rng, reserved=n % 2 == 0) for n in range(40)]
    table.insert(traces, [1.0] * len(traces))
    prompts = reserved_prompts(table, 4)()
    assert prompts == [t.tokens[: t.prompt_len].tolist() for t in traces[32::2]]


def test_without_a_buffer_nothing_is_probed() -> None:
    class Gone:
        def all(self, stratum: str, n: int) -> Any:
            raise TableUnavailable("down")

    assert reserved_prompts(Gone())() == []  # type: ignore[arg-type]
