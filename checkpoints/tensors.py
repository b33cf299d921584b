"""Tensors to bytes and back: digests, specs and the safetensors file. No other module writes or parses weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse
from safetensors.torch import save_file
from torch import Tensor

from checkpoints.errors import CorruptCheckpoint
from checkpoints.manifest import TensorSpec


def dtype_name(tensor: Tensor) -> str:
    """torch's name of the dtype without the prefix: `float32`."""
    return str(tensor.dtype).removeprefix("torch.")


def tensor_digest(tensor: Tensor) -> str:
    """sha256 of the tensor's bytes in row-major order, whatever its device and strides."""
    return hashlib.sha256(_raw(tensor)).hexdigest()


def state_digest(state: Mapping[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes, in the order of the names: see `checkpoints.manifest.weights_id`."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name]
        digest.update(f"{name}\0{dtype_name(tensor)}\0{tuple(tensor.shape)}\0".encode())
        digest.update(_raw(tensor))
    return digest.hexdigest()


def snapshot(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies on the CPU, none sharing storage: what is hashed is written, even if training goes on."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def specs(tensors: Mapping[str, Tensor]) -> tuple[TensorSpec, ...]:
    """Name, shape, dtype and sha256 of each tensor, sorted by name."""
    return tuple(
        TensorSpec(name, tuple(tensor.shape), dtype_name(tensor), tensor_digest(tensor))
        for name, tensor in sorted(tensors.items())
    )


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Name of the first tensor that holds a NaN or an infinity, None if every value is finite."""
    return next((name for name, tensor in sorted(tensors.items()) if not bool(torch.isfinite(tensor).all())), None)


def write(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a safetensors file and give its sha256. The caller makes it durable (fsync)."""
    save_file(dict(tensors), path, metadata={"format": "pt"})
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read(path: Path, sha256: str) -> dict[str, Tensor]:
    """The tensors of a file whose sha256 is as expected, on the CPU.

    Raises:
        CorruptCheckpoint: (`sha256`) the bytes are not those that were published; nothing is parsed.
        OSError: the file cannot be read.
    """
    data = path.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise CorruptCheckpoint(
            "sha256",
            f"{path} ({len(data)} bytes, sha256 {found[:12]}) is not the published file (sha256 {sha256[:12]}): "
            "it was truncated or overwritten; promote another version",
        )
    try:
        return parse(data)
    except SafetensorError as exc:
        raise CorruptCheckpoint("sha256", f"{path} is not a safetensors file ({exc}); promote another version") from exc


def _raw(tensor: Tensor) -> memoryview:
    """The bytes in row-major order; a view for a contiguous CPU tensor, a copy otherwise."""
    raw: memoryview = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return raw
