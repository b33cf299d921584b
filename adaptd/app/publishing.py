"""Puts a publisher together for one vLLM server: a writer actor that has the models, and the HTTP side here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from adaptd import log
from adaptd.actors.parts import load_draft
from adaptd.actors.threads import set_threads
from adaptd.config import Config
from adaptd.errors import ConfigError, PublishFailed
from adaptd.sidecar.client import VllmClient, is_loopback
from adaptd.sidecar.probes import Prober
from adaptd.sidecar.publisher import Publisher
from adaptd.sidecar.update import Update
from adaptd.sidecar.writer import UpdateWriter
from buffers.connection import masked
from buffers.errors import TableUnavailable
from buffers.table import ReplayTable
from checkpoints.errors import CheckpointError
from checkpoints.store import CheckpointStore


def build_publisher(
    config: Config,
    url: str,
    *,
    headers: Mapping[str, str] | None = None,
    prompts: Callable[[], Sequence[Sequence[int]]] | None = None,
    folder: Path | None = None,
    server_folder: str | None = None,
    allow_remote: bool = False,
) -> Publisher:
    """The publisher of one server. Ray must be up when it first publishes.

    Args:
      url: of the server.
      headers: such as an Authorization of the server's API key.
      prompts: probe prompts as token ids, see `reserved_prompts`; None: nothing is probed.
      folder: of the update files; None: that of a single server.
      server_folder: folder of the update files as the server sees it, where that is not as it is seen here.
      allow_remote: publish to a server that other machines can reach, whose development routes have no key.

    Raises:
      ConfigError: the server can be reached by others and that is not allowed.
    """
    if not (allow_remote or is_loopback(url)):
        raise ConfigError(
            f"the server at {masked(url)} can be reached from other machines, and vLLM's development routes, by which weights "
            "are replaced, have no key: let it listen on loopback or a unix socket, or set upstream.publish_remote: true"
        )
    client = VllmClient(url, headers=headers)
    folder = folder or config.home / "updates"
    prober = None if prompts is None else Prober(client, prompts)
    return Publisher(client, remote_writer(config, folder), folder=server_folder, prober=prober, seed=config.seed)


def reserved_prompts(table: ReplayTable, n: int = 16) -> Callable[[], list[list[int]]]:
    """Gives the prompts of the newest `n` reserved traces: the traffic on which the gate judges, never trained on.

    Without the buffer there are none, and a version is published unprobed.
    """

    def prompts() -> list[list[int]]:
        try:
            samples = table.all("reserved", n)
        except TableUnavailable:
            return []
        return [sample.trace.tokens[: sample.trace.prompt_len].tolist() for sample in samples]

    return prompts


class WriterActor:
    """Versions to update files, one at a time on the CPU, in a process that has the models."""

    def __init__(self, config: Config, folder: Path) -> None:
        log.configure(config.log.level, config.log.style)
        set_threads(config.learn.threads, config.learn.niceness)
        draft, identity = load_draft(config, "cpu", "auto", serving=True)
        store = CheckpointStore(config.home / "checkpoints")
        self._writer = UpdateWriter(draft, store, folder, identity.tokenizer_hash)

    def write(self, version: int) -> Update:
        """The update file of one version; 0 is day 0. Raises what `UpdateWriter.write` raises."""
        return self._writer.write(version)


def remote_writer(config: Config, folder: Path) -> Callable[[int], Any]:
    """A coroutine function that has an actor write the update of a version; the actor starts with the first call."""
    actor: Any = None

    async def write(version: int) -> Update:
        nonlocal actor
        if actor is None:
            actor = ray.remote(WriterActor).options(num_cpus=0, max_restarts=-1).remote(config, folder)
        try:
            update: Update = await actor.write.remote(version)
        except CheckpointError as error:
            # Ray raises a subclass of the cause; the publisher wants the cause itself.
            raise PublishFailed("checkpoint", str(getattr(error, "cause", error))) from error
        except RayError as error:
            raise PublishFailed("checkpoint", f"the process that writes updates died ({error}); try again") from error
        return update

    return write
