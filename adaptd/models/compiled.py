"""The compiled kernels of decoding on a CPU: built once for a machine with its C++ compiler, and loaded from then on.

What is compiled is in the folder `kernels`, without anything that has to be kept in step with this machine: the sources are
compiled for its own processor against the installed torch. Where that fails, everything runs without them, more slowly.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import structlog
import torch

from adaptd import events

_log = structlog.get_logger(__name__)

_SOURCES = Path(__file__).parent / "kernels"
_MAIN = "decoder.cpp"
_FLAGS = ("-O3", "-std=c++20", "-fPIC", "-fopenmp")
#: What `library`, and loading it, may raise; and what to do then.
FAILURES = (OSError, RuntimeError, subprocess.SubprocessError)
REMEDY = "install g++ (or name a C++20 compiler in CXX) for a faster decoder, or set engine.compiled to false"
#: A compiler that needs longer than this has hung; it takes some 20 seconds.
_TIMEOUT_S = 600.0


@functools.cache
def kernels() -> Any | None:
    """The classes and operations of `kernels/decoder.cpp`; None where they cannot be built, which is logged once.

    The first call on a machine compiles, which takes some 20 seconds; another process that asks meanwhile waits. Thread-safe.
    """
    try:
        load()
    except FAILURES as error:
        _log.warning(events.KERNELS_MISSING, error=str(error), remedy=REMEDY)
        return None
    return torch.classes.adaptd


def stored_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`torch.nn.functional.linear` for a few rows and a weight as it is stored; needs `kernels`."""
    found: torch.Tensor = torch.ops.adaptd.stored_product.default(x, weight, bias)
    return found


def load() -> Path:
    """Builds the library where there is none, and loads it; which it is. Raises: one of `FAILURES`."""
    found = library()
    torch.ops.load_library(str(found))
    return found


def library() -> Path:
    """The library for these sources, this torch, compiler and processor; compiled if there is none.

    Raises: OSError, SubprocessError: there is no compiler, or it failed.
    """
    compiler = shlex.split(os.environ.get("CXX", "")) or [c for c in map(shutil.which, ("g++", "clang++")) if c][:1]
    if not compiler:
        raise OSError("no C++ compiler was found")
    sources = sorted(_SOURCES.iterdir())
    known = hashlib.sha256()
    for text in (
        *_FLAGS,
        *compiler,
        torch.__version__,
        platform.machine(),
        _processor(),
        *map(Path.read_text, sources),
    ):
        known.update(text.encode() + b"\0")
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "adaptd" / "kernels"
    found = folder / f"{known.hexdigest()[:16]}.so"
    folder.mkdir(parents=True, exist_ok=True)
    # The lock goes with its process: one that was killed while it compiled holds up nobody.
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not found.exists():
            _log.info(events.KERNELS_COMPILED, library=str(found), about="once for this machine, some 20 seconds")
            part = found.with_suffix(f".{os.getpid()}")
            try:
                _run(_command(compiler, part))
                part.replace(found)
            finally:
                part.unlink(missing_ok=True)
    return found


def _command(compiler: Sequence[str], library: Path) -> list[str]:
    root = Path(torch.__file__).parent
    native = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
    # OpenMP's runtime is not linked: torch has loaded its own, and a second one would have threads of its own.
    link = (
        ["-Wl,-z,now", "-nodefaultlibs", "-lstdc++", "-lm", "-lc", "-lgcc_s", "-lgcc"]
        if sys.platform == "linux"
        else []
    )
    libraries = ["-lc10", "-ltorch_cpu"]
    return [
        *(*compiler, *_FLAGS, native, "-shared", "-isystem", str(root / "include"), str(_SOURCES / _MAIN)),
        *("-o", str(library), f"-L{root / 'lib'}", *libraries, *link),
    ]


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    if done.returncode != 0:
        first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[-300:])
        raise OSError(f"{command[0]} failed with {done.returncode}: {first}")


def _processor() -> str:
    """What `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
