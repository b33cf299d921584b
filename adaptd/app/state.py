"""The deployment's folder: one daemon at a time, and where to find it."""

from __future__ import annotations

import fcntl
import json
import os
import time
from pathlib import Path
from typing import Any

from adaptd.errors import DaemonUnavailable, StateDirError

_FILE = "daemon.json"


class StateDir:
    """Holds the folder's lock while a daemon runs.

    Raises:
      StateDirError: the folder cannot be created or written, or another daemon holds it.
    """

    def __init__(self, home: Path) -> None:
        self.home = home
        try:
            home.mkdir(parents=True, exist_ok=True)
            self._lock = (home / "lock").open("a")
        except OSError as error:
            raise StateDirError(
                f"state_dir {home} cannot be written ({error.strerror}): set state_dir to a writable folder"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StateDirError(
                f"another daemon runs on {home}: stop it, or set another deployment or state_dir"
            ) from error

    def announce(self, url: str) -> None:
        """Say where the daemon listens, for `adaptd status` in another terminal."""
        partial = self.home / f"{_FILE}.tmp"
        partial.write_text(json.dumps({"url": url, "pid": os.getpid(), "started_at": time.time()}))
        partial.replace(self.home / _FILE)

    def close(self) -> None:
        """Forget the address and give the lock back."""
        (self.home / _FILE).unlink(missing_ok=True)
        self._lock.close()


def find_daemon(home: Path) -> dict[str, Any]:
    """Address of the daemon that runs on this folder.

    Raises:
      DaemonUnavailable: none runs.
    """
    try:
        found: dict[str, Any] = json.loads((home / _FILE).read_text())
        os.kill(int(found["pid"]), 0)
    except (OSError, ValueError, KeyError) as error:
        raise DaemonUnavailable(f"no adaptd daemon runs for {home}: start one with `adaptd serve`") from error
    return found
