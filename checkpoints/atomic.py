"""Durable, atomic file operations and the writer lock: what "CURRENT always names a complete version" rests on.

Standard library only. A rename is atomic on one file system, and durable once the folder that holds the name is synced.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from checkpoints.errors import StoreUnavailable

#: Seconds between two attempts at a lock that is held.
_LOCK_POLL_S = 0.02


def sync(path: Path) -> None:
    """Make a file's bytes, or the names inside a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_text(path: Path, text: str) -> None:
    """Replace a small file: a reader, or a crash at any moment, meets the old text or the new, never a mixture."""
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.write_text(text, encoding="ascii")
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


@contextmanager
def exclusive(path: Path, timeout_s: float) -> Iterator[None]:
    """Hold the advisory lock on `path` (created if absent); the kernel frees it when the process dies, however it dies.

    Raises:
        StoreUnavailable: another writer, in this process or another, held it for `timeout_s` seconds.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as exc:
                if time.monotonic() >= deadline:
                    raise StoreUnavailable(
                        f"{path} was held by another writer for {timeout_s:g} s; only one daemon may use a state_dir"
                    ) from exc
                time.sleep(_LOCK_POLL_S)
        yield
    finally:
        os.close(descriptor)
