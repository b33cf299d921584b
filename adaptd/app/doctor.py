"""`adaptd doctor`: does this configuration hold together on this machine? Each check with its remedy."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import ray
import torch

from adaptd.actors.parts import placement
from adaptd.app.check import Check
from adaptd.app.doctor_vllm import vllm_checks
from adaptd.app.state import find_daemon
from adaptd.config import Config
from adaptd.errors import AdaptdError, ConfigError, DaemonUnavailable, RequestRefused
from adaptd.models import compiled, load
from adaptd.models.chat import render_chat
from adaptd.models.scope import AdaptedDraft, ScopeConfig
from buffers.embedded import start_embedded
from buffers.errors import ReplayError
from buffers.open import open_table

_MIN_FREE_BYTES = 2 * 2**30


def run(config: Config) -> list[Check]:
    """All checks, in order; a check that fails does not stop the next."""
    groups = [_models, _kernels, _disk, _redis, _ray, _gpu, _port]
    if config.engine.kind == "vllm":
        groups.append(vllm_checks)
    return [check for group in groups for check in group(config)]


def _models(config: Config) -> Iterator[Check]:
    # Behind the proxy the target is the server's: here nobody needs its weights, only its tokenizer.
    remote = config.engine.kind == "vllm"
    try:
        folder = load.resolve(config.target.model, "target")
        target = None if remote else load.load_causal_lm(folder, dtype="auto", device="cpu")
        draft = load.load_draft(load.resolve(config.draft.model, "draft"), dtype="auto", device="cpu").model
        target_tokenizer = load.load_tokenizer(folder)
        draft_tokenizer = load.load_tokenizer(load.resolve(config.draft.model, "draft"))
    except ConfigError as error:
        yield Check("models", "failed", str(error), "set target.model and draft.model to Hugging Face folders or names")
        return
    size = "in the server" if target is None else f"{sum(p.numel() for p in target.parameters()):,}"
    yield Check("models", "ok", f"target {size}, draft {sum(p.numel() for p in draft.parameters()):,} parameters")
    try:
        load.check_same_vocabulary(draft if target is None else target, draft, target_tokenizer, draft_tokenizer)
        yield Check("vocabulary", "ok", f"{load.vocab_size(draft):,} tokens, the same in both")
    except AdaptdError as error:
        yield Check("vocabulary", "failed", str(error), "use a draft that was made for this target's tokenizer")
    try:
        ids = render_chat(target_tokenizer, [{"role": "user", "content": "hello"}])
        yield Check("chat template", "ok", f"renders a user turn to {len(ids)} tokens")
    except RequestRefused as error:
        yield Check(
            "chat template", "warning", str(error), "use /v1/completions, or add a chat_template to the tokenizer"
        )
    try:
        adapted = AdaptedDraft(draft, ScopeConfig(**config.adapt.model_dump(), seed=config.seed))
        yield Check("scope", "ok", f"{adapted.scope}: {adapted.trainable_fraction:.1%} of the draft's parameters learn")
    except ConfigError as error:
        yield Check("scope", "failed", str(error), "change section adapt of the configuration")


def _kernels(config: Config) -> Iterator[Check]:
    if config.engine.kind == "vllm" or not config.engine.compiled or placement(config, 0)[0] != "cpu":
        return
    try:
        yield Check("kernels", "ok", f"compiled: {compiled.load()}")
    except compiled.FAILURES as error:
        yield Check("kernels", "warning", f"decoding on a CPU runs without them: {error}", compiled.REMEDY)


def _disk(config: Config) -> Iterator[Check]:
    home = config.home
    try:
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=home):
            pass
    except OSError as error:
        yield Check("state_dir", "failed", f"{home}: {error.strerror}", "set state_dir to a writable folder")
        return
    free = shutil.disk_usage(home).free
    state: Literal["ok", "warning"] = "ok" if free >= _MIN_FREE_BYTES else "warning"
    yield Check(
        "state_dir", state, f"{home}, {free / 2**30:.1f} GiB free", "" if state == "ok" else "free at least 2 GiB"
    )


def _redis(config: Config) -> Iterator[Check]:
    def reach(url: str) -> str:
        info = open_table(url, config.deployment, **config.buffer.model_dump(exclude={"url"})).info()
        return f"{sum(info.sizes.values()):,} traces"

    try:
        if config.buffer.url != "embedded":
            yield Check("redis", "ok", f"{config.buffer.url}: {reach(config.buffer.url)}")
            return
        with tempfile.TemporaryDirectory(prefix="adaptd-doctor-") as folder:
            server = start_embedded(Path(folder))
            try:
                yield Check("redis", "ok", f"embedded server starts: {reach(server.url)}")
            finally:
                server.close()
    except (ReplayError, OSError, ValueError) as error:
        remedy = "start Redis or correct buffer.url; serving goes on without it, adaptation does not"
        yield Check("redis", "failed", str(error), remedy)


def _ray(config: Config) -> Iterator[Check]:
    if config.ray.address != "local":
        yield _reached("ray", lambda: _ray_nodes(config.ray.address), f"is a cluster running at {config.ray.address}?")
        return
    yield Check(
        "ray", "ok", f"ray {ray.__version__}; a private cluster is started with the daemon, {os.cpu_count()} cores"
    )


def _reached(name: str, probe: Callable[[], str], remedy: str) -> Check:
    try:
        return Check(name, "ok", probe())
    except (ConnectionError, RuntimeError, ValueError) as error:
        return Check(name, "failed", str(error).splitlines()[0], remedy)


def _ray_nodes(address: str) -> str:
    ray.init(address=address, log_to_driver=False)
    try:
        return f"{len(ray.nodes())} nodes, {ray.cluster_resources()}"
    finally:
        ray.shutdown()


def _gpu(config: Config) -> Iterator[Check]:
    if not torch.cuda.is_available():
        wanted = config.engine.device.startswith("cuda") or config.ray.decoder_gpus > 0
        remedy = "install a CUDA build of torch, or set engine.device: cpu and ray.decoder_gpus: 0" if wanted else ""
        yield Check("gpu", "failed" if wanted else "ok", "no CUDA device; decoding on the CPU", remedy)
        return
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        yield Check(
            "gpu", "ok", f"{torch.cuda.get_device_name(index)}: {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
        )


def _port(config: Config) -> Iterator[Check]:
    try:
        found = find_daemon(config.home)
        yield Check("port", "ok", f"a daemon runs: {found['url']}")
        return
    except DaemonUnavailable:
        pass
    try:
        with socket.create_server((config.server.host, config.server.port)):
            yield Check("port", "ok", f"{config.server.host}:{config.server.port} is free")
    except OSError as error:
        where = f"{config.server.host}:{config.server.port}"
        yield Check("port", "failed", f"{where}: {error.strerror}", "set server.port to a free port, or 0")
