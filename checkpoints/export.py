"""What leaves adaptd for another engine: a model folder that appears whole or not at all, and update files.

Knows nothing of models: the caller fills the folder and names the tensors. Nothing here is read back by adaptd.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from checkpoints import atomic
from checkpoints.errors import CorruptCheckpoint, StoreUnavailable

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class UpdateFile:
    """Changed tensors on disk, as a running engine reads them."""

    path: Path
    sha256: str
    """Of the whole file."""
    tensors: int
    bytes: int
    """Size of the tensors without the file's header."""


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A temporary folder to fill; it becomes `out` when the block ends, and is removed if the block raises.

    Raises:
        StoreUnavailable: `out` exists and is not an empty folder, or its parent cannot be written.
    """
    out = out.expanduser().absolute()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise StoreUnavailable(f"{out} exists and is not an empty folder: name a new one, or remove it first")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".tmp-{out.name}-", dir=out.parent))
    except OSError as exc:
        raise StoreUnavailable(f"{exc.filename or out.parent}: {exc.strerror or exc}; choose a writable place") from exc
    try:
        yield unfinished
        for path in [*unfinished.rglob("*"), unfinished]:
            # Temporary folders and safetensors files are made for their owner alone; the server may run as another.
            path.chmod(0o755 if path.is_dir() else 0o644)
            atomic.sync(path)
        os.replace(unfinished, out)
        atomic.sync(out.parent)
    except OSError as exc:
        raise StoreUnavailable(f"{exc.filename or out}: {exc.strerror or exc}; check the disk's room") from exc
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write_update(path: Path, tensors: Mapping[str, Tensor]) -> UpdateFile:
    """Write tensors as one safetensors file, atomically.

    Raises:
        CorruptCheckpoint: (`not_finite`) a tensor holds NaN or infinity; nothing was written.
        ValueError: there are no tensors.
        StoreUnavailable: the folder cannot be written.
    """
    from checkpoints import tensors as files  # torch takes seconds to import, and naming an update does not need it

    if not tensors:
        raise ValueError("tensors (0) must not be empty; an update without tensors changes nothing")
    if (name := files.not_finite(tensors)) is not None:
        raise CorruptCheckpoint("not_finite", f"{path.name}: {name} holds NaN or infinity; publish another version")
    copies = files.snapshot(tensors)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".tmp-{path.name}")
        digest = files.write(unfinished, copies)
        unfinished.chmod(0o644)
        atomic.sync(unfinished)
        os.replace(unfinished, path)
        atomic.sync(path.parent)
    except OSError as exc:
        raise StoreUnavailable(f"{exc.filename or path}: {exc.strerror or exc}; check the disk's room") from exc
    return UpdateFile(path.absolute(), digest, len(copies), sum(t.nbytes for t in copies.values()))
