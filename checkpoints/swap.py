"""The verified swap: everything is checked before the first value is written, then the tensors are copied in place.

Copying in place keeps every storage, so compiled graphs, optimisers and caches that point at the parameters stay valid.
There is no half swap: a checkpoint is refused with a reason and the model is untouched, or all of it arrives. `check`
hashes and scans every value and belongs off the decoding thread; `copy_in_place` is the short part that runs between
two rounds.

A manifest with `is_reset` holds no tensors: `check` accepts it (base and tokenizer still have to match) and the caller
resets the draft to day 0.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from checkpoints.errors import CorruptCheckpoint, IncompatibleCheckpoint
from checkpoints.manifest import Manifest
from checkpoints.tensors import dtype_name, not_finite, tensor_digest


@dataclass(frozen=True, slots=True)
class SwapReport:
    """What one swap did."""

    version: int
    tensors: int
    bytes: int
    seconds: float
    """Time of the copy itself: how long decoding stood still."""


def check(
    manifest: Manifest, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], base_id: str, tokenizer_hash: str
) -> None:
    """Raise unless the checkpoint may be copied into `expected`; writes nothing.

    Args:
        manifest: of the version.
        tensors: its tensors, on any device.
        expected: the draft's trainable tensors by name, the destination of the copy.
        base_id: `weights_id` of the base draft that is loaded here.
        tokenizer_hash: of the tokenizer that is loaded here.

    Raises:
        IncompatibleCheckpoint: `base`, `tokenizer`, `missing`, `unexpected`, `shape`, `dtype`.
        CorruptCheckpoint: `manifest` (it contradicts the tensors), `sha256`, `not_finite`.
    """
    version = f"version {manifest.version}"
    if manifest.base_id != base_id:
        raise IncompatibleCheckpoint(
            "base",
            f"{version} adapts the base draft {manifest.base_id[:12]} but {base_id[:12]} is loaded; "
            "load that draft or use another state_dir",
        )
    if manifest.tokenizer_hash != tokenizer_hash:
        raise IncompatibleCheckpoint(
            "tokenizer",
            f"{version} was trained with the tokenizer {manifest.tokenizer_hash[:12]} but {tokenizer_hash[:12]} is "
            "loaded; load that tokenizer or use another state_dir",
        )
    if not manifest.is_reset:
        _fits(expected, tensors, version)
    _agree(manifest, tensors)
    if (name := not_finite(tensors)) is not None:
        raise CorruptCheckpoint("not_finite", f"{version}: {name} holds NaN or infinity; promote another version")
    for spec in manifest.tensors:
        if spec.sha256 is not None and tensor_digest(tensors[spec.name]) != spec.sha256:
            raise CorruptCheckpoint(
                "sha256",
                f"{version}: the bytes of {spec.name} are not those that were published; promote another version",
            )


def copy_in_place(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], *, version: int = 0) -> SwapReport:
    """Copy `tensors` into `expected`, all or nothing.

    Names, shapes and dtypes are compared, and the values brought to their devices, before the first write; values and
    provenance are `check`'s part. `version` only labels the report.

    Raises:
        IncompatibleCheckpoint: `missing`, `unexpected`, `shape`, `dtype`; nothing was written.
    """
    _fits(expected, tensors, f"version {version}")
    staged = {name: tensor.detach().to(expected[name].device) for name, tensor in tensors.items()}
    started = time.perf_counter()
    with torch.no_grad():
        for name, destination in expected.items():
            destination.copy_(staged[name])
    seconds = time.perf_counter() - started
    return SwapReport(version, len(staged), sum(tensor.nbytes for tensor in staged.values()), seconds)


def _fits(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], version: str) -> None:
    """Raise unless names, shapes and dtypes are exactly those of the destination."""
    remedy = "it was made with another adapt configuration; use that configuration or another state_dir"
    if missing := sorted(expected.keys() - tensors.keys()):
        raise IncompatibleCheckpoint("missing", f"{version} lacks {_some(missing)}, which this draft trains: {remedy}")
    if unexpected := sorted(tensors.keys() - expected.keys()):
        raise IncompatibleCheckpoint(
            "unexpected", f"{version} holds {_some(unexpected)}, which this draft does not train: {remedy}"
        )
    for name, destination in expected.items():
        source = tensors[name]
        if source.shape != destination.shape:
            shapes = f"{tuple(source.shape)} where this draft has {tuple(destination.shape)}"
            raise IncompatibleCheckpoint("shape", f"{version}: {name} is {shapes}: {remedy}")
        if source.dtype != destination.dtype:
            dtypes = f"{dtype_name(source)} where this draft has {dtype_name(destination)}"
            raise IncompatibleCheckpoint("dtype", f"{version}: {name} is {dtypes}: {remedy}")


def _agree(manifest: Manifest, tensors: Mapping[str, Tensor]) -> None:
    """Raise unless the manifest lists exactly these tensors."""
    listed = {spec.name: (spec.shape, spec.dtype) for spec in manifest.tensors}
    found = {name: (tuple(tensor.shape), dtype_name(tensor)) for name, tensor in tensors.items()}
    if wrong := sorted(name for name in listed.keys() | found.keys() if listed.get(name) != found.get(name)):
        raise CorruptCheckpoint(
            "manifest",
            f"version {manifest.version}: manifest and tensors disagree on {_some(wrong)}; promote another version",
        )


def _some(names: list[str]) -> str:
    """The first three names, and how many more."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
