"""The folder that a replay works in: its spool, and what makes an interrupted one go on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import buffers.embedded
from adaptd.app.replay.learning import copy_current
from adaptd.app.state import StateDir
from adaptd.config import Config
from adaptd.errors import AdaptdError, StateDirError
from buffers.open import open_table
from buffers.table import ReplayTable

#: Learned tensors and moments, beside the checkpoints.
_LEARNER = "learner"


class Work:
    """One replay's folders.

    Args:
      files: what is read; with `about`, what another run must have in common to go on with this one.
      dry: whether the deployment itself stays as it is: everything is then learned in this folder.
    """

    def __init__(self, config: Config, files: Sequence[str], about: dict[str, Any], *, dry: bool) -> None:
        sizes = [[f, *((s.st_size, s.st_mtime_ns) if (s := _stat(f)) else ())] for f in files]
        told = config.model_dump(mode="json", exclude={"server", "log", "ray"})
        identity = json.dumps([sizes, about, dry, told], sort_keys=True, default=str)
        self._config, self._dry = config, dry
        self.folder = config.home / "replay" / hashlib.sha256(identity.encode()).hexdigest()[:16]
        self.home = self.folder / "home" if dry else config.home
        self.start = self.folder / "start"
        self.spool = self.folder / "spool.sqlite"

    def prepare(self, *, fresh: bool) -> bool:
        """Make the folders; whether an earlier run of the same replay is gone on with.

        Raises:
          StateDirError: they cannot be written.
        """
        try:
            if fresh:
                shutil.rmtree(self.folder, ignore_errors=True)
            resumed = self.spool.is_file()
            if not resumed:
                shutil.rmtree(self.folder, ignore_errors=True)
                # Logs hold what people wrote: for nobody else to read.
                self.folder.mkdir(parents=True, mode=0o700)
                copy_current(self._config.home / "checkpoints", self.start)
                if self._dry:
                    self._copy_deployment()
        except OSError as error:
            raise StateDirError(
                f"{self.folder} cannot be written ({error.strerror}): set state_dir to a writable folder"
            ) from error
        return resumed

    def _copy_deployment(self) -> None:
        copy_current(self._config.home / "checkpoints", self.home / "checkpoints")
        if (learner := self._config.home / _LEARNER).is_dir():
            shutil.copytree(learner, self.home / _LEARNER)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep daemons and other replays off the deployment; a dry run leaves it to them.

        Raises:
          AdaptdError: one is there.
        """
        if self._dry:
            yield
            return
        try:
            lock = StateDir(self._config.home)
        except StateDirError as error:
            raise AdaptdError(f"{error}; or pass --dry-run, which leaves the deployment as it is") from error
        try:
            yield
        finally:
            lock.close()

    @contextmanager
    def table(self) -> Iterator[ReplayTable]:
        """The deployment's buffer; a dry run has one of its own."""
        options = self._config.buffer.model_dump(exclude={"url"})
        url = self._config.buffer.url
        if url != "embedded" and not self._dry:
            yield open_table(url, self._config.deployment, **options)
            return
        server = buffers.embedded.start_embedded(self.home / "redis")
        try:
            yield open_table(server.url, self._config.deployment, **options)
        finally:
            server.close()

    def remove(self) -> None:
        """The replay is over: nothing of it is needed any more."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _stat(name: str) -> os.stat_result | None:
    path = Path(name)
    return path.stat() if path.is_file() else None
