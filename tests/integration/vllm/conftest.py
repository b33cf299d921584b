"""A real vLLM server with the pocket target and a prepared pocket draft, and versions of that draft.

The server is found by ADAPTD_VLLM, a virtual environment's folder; default `.vllm` in the checkout, made by
`make .vllm/.installed`. Where it is absent these tests are skipped.
"""

import asyncio
import contextlib
import os
import tomllib
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adaptd.actors.parts import load_draft
from adaptd.app import export
from adaptd.config import Config, load
from adaptd.learning.learner import DraftLearner
from adaptd.sidecar.writer import UpdateWriter
from buffers.table import ReplaySample, SampleInfo
from checkpoints.store import CheckpointStore
from tests.integration.vllm.helpers import MAX_TOKENS, Draft, traces_of
from tests.integration.vllm.server import VllmServer

ROOT = Path(__file__).parents[3]
_FAULT = """
import os

def register():
    from vllm.model_executor.models.llama import LlamaForCausalLM as model
    if getattr(model, "planted", False):
        return
    model.planted, original = True, model.load_weights

    def some(weights):
        for index, item in enumerate(weights):
            if index == 9 and os.path.exists(os.environ["PLANTED_FAULT"]):
                raise RuntimeError("planted fault")
            yield item

    model.load_weights = lambda self, weights: original(self, some(weights))
"""


@pytest.fixture(scope="session")
def vllm_home() -> Path:
    """The virtual environment that holds vLLM."""
    home = Path(os.environ.get("ADAPTD_VLLM", ROOT / ".vllm"))
    if not (home / "bin" / "vllm").exists():
        pytest.skip(f"no vLLM in {home}: run `make .vllm/.installed`, or set ADAPTD_VLLM")
    return home


@pytest.fixture(scope="session")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `pip install --no-deps adaptd` puts into the server's environment: the package and its entry points."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "adaptd").symlink_to(ROOT / "adaptd")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    about = folder / "adaptd-0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: adaptd\nVersion: 0\n")
    group = project["entry-points"]["vllm.general_plugins"]
    lines = "".join(f"{name} = {value}\n" for name, value in group.items())
    # A fault for one test: the draft's loader breaks off in the middle of a module while the named file exists.
    (folder / "planted_fault.py").write_text(_FAULT)
    (about / "entry_points.txt").write_text(f"[vllm.general_plugins]\n{lines}fault = planted_fault:register\n")
    return folder


@pytest.fixture(scope="session")
def swap_settings(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A scope whose versions a running engine can take."""
    home = tmp_path_factory.mktemp("state")
    return load(None, [f"state_dir={home}", "adapt.gated=false", "adapt.head_rank=0", "adapt.embed_rank=0"])


@pytest.fixture(scope="session")
def prepared(swap_settings: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The day-0 draft, widened and untied."""
    out = tmp_path_factory.mktemp("prepared") / "draft"
    export.run(swap_settings, out, version=None, prepare=True, dtype="auto")
    return out


@pytest.fixture(scope="session")
def server(
    vllm_home: Path, plugin: Path, prepared: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[VllmServer]:
    """One for all files of a run: it takes half a minute to start."""
    with _started(vllm_home, plugin, prepared, tmp_path_factory) as running:
        yield running


@pytest.fixture(scope="module")
def second(
    vllm_home: Path, plugin: Path, prepared: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[VllmServer]:
    """Another one of the same pair."""
    with _started(vllm_home, plugin, prepared, tmp_path_factory) as running:
        yield running


@contextlib.contextmanager
def _started(home: Path, plugin: Path, draft: Path, folders: pytest.TempPathFactory) -> Iterator[VllmServer]:
    from adaptd.models.load import resolve

    log = folders.mktemp("vllm") / "server.log"
    running = VllmServer(home, plugin, str(resolve("pocket", "target")), draft, log, log.with_name("fault"))
    try:
        running.start()
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """Token ids of 80 math questions: the traffic that the draft is adapted to."""
    from adaptd.models import load as models
    from adaptd.models.chat import render_chat
    from adaptd.pocket.shipped import pocket_prompts

    tokenizer = models.load_tokenizer(models.resolve("pocket", "target"))
    rendered = [render_chat(tokenizer, [{"role": "user", "content": p}]) for p in pocket_prompts("math")]
    return [ids for ids in rendered if len(ids) + MAX_TOKENS < 200][:80]


@pytest.fixture(scope="session")
def draft(
    swap_settings: Config,
    prompts: list[list[int]],
    server: VllmServer,
    pocket_target: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> Draft:
    """Version 1: a few steps of the learner on the server's own answers. Version 2: version 1 with noise for experts."""
    answers = traces_of(server.url, prompts, pocket_target)
    training, identity = load_draft(swap_settings, "cpu", "float32", serving=False)
    learner = DraftLearner(training, objective="forward_kl", lr=1e-2, optimizer="muon", average_decay=0.0)
    samples = [ReplaySample(SampleInfo(i, 1.0, 1.0, 1, 64, "recent"), t) for i, t in enumerate(answers[:64])]
    rng = np.random.default_rng(0)
    for _ in range(24):
        learner.step([samples[i] for i in rng.integers(len(samples), size=4)], np.ones(4))
    store = CheckpointStore(swap_settings.home / "checkpoints")

    def publish(tensors: dict[str, torch.Tensor]) -> None:
        store.publish(
            tensors,
            base_id=identity.base_id,
            tokenizer_hash=identity.tokenizer_hash,
            scope=identity.scope,
            scope_config=identity.scope_config,
            gate={},
            window={},
            config={},
        )

    publish(training.state())
    generator = torch.Generator().manual_seed(0)
    publish({n: torch.randn(t.shape, generator=generator) for n, t in training.state().items()})
    serving, _ = load_draft(swap_settings, "cpu", "float32", serving=True)
    writer = UpdateWriter(serving, store, tmp_path_factory.mktemp("updates"), identity.tokenizer_hash)
    return Draft(serving, store, writer, answers)


@pytest.fixture
def run() -> Callable[[Callable[[], Awaitable[Any]]], Any]:
    """Run one coroutine function."""

    def start(work: Callable[[], Awaitable[Any]]) -> Any:
        async def main() -> Any:
            return await work()

        return asyncio.run(main())

    return start
