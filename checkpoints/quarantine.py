"""Versions that may not be promoted again, kept beside the versions: `root/quarantine.json`.

    {"schema": 1, "versions": {"7": {"reason": "...", "at": 1700000000.0}}}

It is replaced as a whole, atomically and under the store's writer lock, and outlives the folders of the versions it names.
What the entries mean for other versions, by descent, is decided by `policies.canary.Quarantine`.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from checkpoints import atomic
from checkpoints.errors import CorruptCheckpoint, StoreUnavailable

FILE = "quarantine.json"
SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Entry:
    """Why and when (Unix seconds) a version was quarantined."""

    reason: str
    at: float


class QuarantineFile:
    """The file under one store's root; every call reads it anew, so that several processes agree.

    A file that cannot be read is `CorruptCheckpoint` (`quarantine`): who cannot tell what was refused promotes nothing. Only
    `add` sets it aside, as quarantine.json.damaged: what has to go back now must not wait for an operator.
    """

    def __init__(self, root: Path, *, lock_timeout_s: float = 10.0, clock: Callable[[], float] = time.time) -> None:
        self._root, self._lock_timeout_s, self._clock = root, lock_timeout_s, clock

    def entries(self) -> dict[int, Entry]:
        """What is quarantined, by version."""
        path = self._root / FILE
        try:
            raw = json.loads(path.read_text(encoding="ascii"))
            if raw["schema"] != SCHEMA:
                raise ValueError(f"its schema is not {SCHEMA}, the one this release reads")
            found = {int(n): Entry(str(e["reason"]), float(e["at"])) for n, e in raw["versions"].items()}
        except FileNotFoundError:
            return {}
        except OSError as exc:
            raise StoreUnavailable(f"{path}: {exc.strerror or exc}; check that it can be read") from exc
        except (ValueError, KeyError, TypeError, AttributeError) as exc:
            raise CorruptCheckpoint(
                "quarantine", f"{path} cannot be read ({exc}): restore it from a copy, or remove it to forget it all"
            ) from exc
        return found

    def add(self, reasons: Mapping[int, str]) -> None:
        """Quarantine versions, with the reason of each; one that already is keeps its first.

        Raises:
            StoreUnavailable: the folder cannot be written or the lock was not free in time.
        """
        new = {version: Entry(reason, float(self._clock())) for version, reason in reasons.items()}
        if new:
            self._change(lambda entries: {**new, **entries}, set_aside=True)

    def remove(self, versions: list[int]) -> None:
        """Let versions go; those that are not in it are ignored. Raises as `add`."""
        if versions:
            self._change(lambda entries: {n: e for n, e in entries.items() if n not in versions})

    def _change(self, change: Callable[[dict[int, Entry]], dict[int, Entry]], *, set_aside: bool = False) -> None:
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            with atomic.exclusive(self._root / ".lock", self._lock_timeout_s):
                try:
                    known = self.entries()
                except CorruptCheckpoint:
                    if not set_aside:
                        raise
                    os.replace(self._root / FILE, self._root / f"{FILE}.damaged")
                    known = {}
                entries = change(known)
                versions = {str(number): asdict(entries[number]) for number in sorted(entries)}
                text = json.dumps({"schema": SCHEMA, "versions": versions}, indent=2) + "\n"
                atomic.replace_text(self._root / FILE, text)
        except OSError as exc:
            raise StoreUnavailable(
                f"{exc.filename or self._root}: {exc.strerror or exc}; check that it is writable and the disk has room"
            ) from exc
