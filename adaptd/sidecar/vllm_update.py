"""What the vLLM server makes of an update file before any weight changes: all checks, and the tensors.

An update is a path and a sha256, nothing else; the file is safetensors, so nothing in it is ever executed. Every check
is made on the whole file first: a refused update leaves the draft exactly as it was.

Runs in the server's environment: standard library, torch and safetensors only, no vLLM.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

#: Modules that an engine may share between draft and target: writing to one could change the target's output.
SHARED = frozenset({"embed_tokens", "lm_head", "wte", "wpe", "word_embeddings", "embed_in", "embed_out"})

#: Layers that engines fuse into one. A fused module that receives only some of its parts is filled up with garbage.
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))

#: Largest safetensors header that is read, in bytes; the format's own limit.
_MAX_HEADER = 100_000_000


class UpdateRefused(ValueError):
    """An update that must not reach the draft; the message names value, rule and remedy."""


def read_update(path: str, sha256: str, folder: str | None) -> dict[str, Tensor]:
    """The tensors of an update file, on the CPU, its bytes verified.

    Args:
      path: absolute path, as this process sees it.
      sha256: hexadecimal digest of the whole file.
      folder: folder that updates must lie in, symbolic links resolved; None: anywhere.

    Raises:
      UpdateRefused: no regular file, outside of `folder`, other bytes, no safetensors file, or values not finite.
    """
    place = Path(path)
    if not place.is_absolute():
        raise UpdateRefused(f"path ({path!r}) must be absolute: the server has another working folder")
    real = Path(os.path.realpath(place))
    if folder is not None and not real.is_relative_to(os.path.realpath(folder)):
        raise UpdateRefused(f"path ({path!r}) must lie in {folder!r}, the folder named when the transfer was set up")
    try:
        # Not blocking, so that a named pipe is refused and not waited for.
        descriptor = os.open(real, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise UpdateRefused(f"path ({path!r}) must be a regular file")
            data = file.read()
    except OSError as error:
        raise UpdateRefused(
            f"path ({path!r}) cannot be read: {error.strerror}; server and daemon must share this folder"
        ) from error
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise UpdateRefused(
            f"{path} ({len(data)} bytes, sha256 {found[:12]}) is not the file that was announced (sha256 "
            f"{sha256[:12]}): it was truncated or overwritten; publish again"
        )
    try:
        tensors = load(data)
    except SafetensorError as error:
        raise UpdateRefused(f"{path} is not a safetensors file ({error})") from error
    for name, tensor in sorted(tensors.items()):
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise UpdateRefused(f"{path}: {name} holds NaN or infinity; publish another version")
    return tensors


def check_update(tensors: Mapping[str, Tensor], known: Mapping[str, Sequence[int]]) -> None:
    """Return if the draft can take these tensors whole.

    Args:
      tensors: of the update, under the architecture's Hugging Face names.
      known: shapes of the tensors in the folder that the server loaded the draft from.

    Raises:
      UpdateRefused: nothing to write, a name or shape the draft does not have, a module that may be shared with the
        target, or only a part of a module that vLLM fuses.
    """
    if not tensors:
        raise UpdateRefused("the update (0 tensors) must hold at least one")
    remedy = "start the server with the folder that `adaptd export --prepare` wrote for this configuration"
    for name, tensor in sorted(tensors.items()):
        if name not in known:
            raise UpdateRefused(f"{name} is no tensor of the draft that this server loaded: {remedy}")
        if tuple(tensor.shape) != tuple(known[name]):
            shapes = f"{tuple(tensor.shape)} where this server's draft has {tuple(known[name])}"
            raise UpdateRefused(f"{name} is {shapes}: {remedy}")
        if SHARED & set(name.split(".")):
            raise UpdateRefused(f"{name} may be shared with the target and is never written: publish without it")
    missing = whole(tensors, known) - tensors.keys()
    if missing:
        raise UpdateRefused(
            f"{len(missing)} tensors of half-sent modules are missing, first {min(missing)}: vLLM fuses "
            "q, k, v and gate, up and fills what is not sent with garbage; send whole modules"
        )


def whole(names: Iterable[str], known: Iterable[str]) -> set[str]:
    """The names, among the known, of every tensor of each module that `names` touches, fused siblings included."""
    modules = set()
    for name in names:
        parts = name.split(".")[:-1]
        modules.add(".".join(parts))
        for group in FUSED:
            if parts and parts[-1] in group:
                modules |= {".".join([*parts[:-1], sibling]) for sibling in group}
    return {name for name in known if ".".join(name.split(".")[:-1]) in modules}


def stored_shapes(folder: str | os.PathLike[str]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors in a model folder's safetensors files, from their headers alone.

    Raises:
      UpdateRefused: there is no such file, or one has no readable header.
    """
    found: dict[str, tuple[int, ...]] = {}
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise UpdateRefused(f"{folder} holds no safetensors file, so the draft's tensors are not known")
    for path in files:
        try:
            with path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                if size > _MAX_HEADER:
                    raise ValueError(f"its header claims {size} bytes")
                header = json.loads(file.read(size))
        except (OSError, ValueError) as error:
            raise UpdateRefused(f"{path} has no readable header: {error}") from error
        found |= {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    return found
