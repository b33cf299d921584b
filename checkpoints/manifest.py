"""What a published version says about itself: `manifest.json` as frozen values with a strict reader.

A manifest is written once and never changed. The module imports neither torch nor safetensors, so that listing versions
is instant.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, get_args

from checkpoints.errors import CorruptCheckpoint

if TYPE_CHECKING:
    from torch import Tensor

#: Version of the manifest's own format; a reader refuses any other.
SCHEMA = 1

#: How the version came to be. `candidate`: described but not published (the store never writes it); `promoted`:
#: published by the learner after its gate, or chosen by an operator; `rolled_back`: an earlier version's tensors
#: published again.
Status = Literal["candidate", "promoted", "rolled_back"]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of the checkpoint."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """torch's name without the prefix, such as `float32` or `bfloat16`."""
    sha256: str | None = None
    """Of the tensor's bytes in row-major order; None if it was not recorded."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything about one version except the weights themselves."""

    version: int
    """From 1, without gaps; version 0 is the base draft and has no manifest."""
    parent: int | None
    """The version that a rollback of this one restores; None means the base draft."""
    base_id: str
    """`weights_id` of the base draft that these tensors adapt."""
    tokenizer_hash: str
    scope: str
    """Which tensors train: `lora`, `private_expert` or `full`."""
    scope_config: Mapping[str, Any]
    tensors: tuple[TensorSpec, ...]
    """Sorted by name. Empty means "the base draft as it was on day 0": see `is_reset`."""
    sha256: str
    """Of the whole file draft.safetensors."""
    gate: Mapping[str, Any]
    """The verdict that let this version pass, as plain JSON."""
    window: Mapping[str, Any]
    """Which traces it learned from, as plain JSON."""
    config: Mapping[str, Any]
    created_at: float
    """Unix time, seconds."""
    status: Status
    note: str = ""
    restored: int | None = None
    """The version whose tensors were published again (0: the base draft); None for new tensors."""

    @property
    def is_reset(self) -> bool:
        """Whether this version means "back to the base draft": no tensors, and a decoder resets instead of copying."""
        return not self.tensors

    @property
    def bytes(self) -> int:
        """Size of the tensors in bytes, without file headers."""
        return sum(math.prod(spec.shape) * _ITEM_BYTES[spec.dtype] for spec in self.tensors)

    def to_json(self) -> str:
        """The manifest as indented JSON with stable key order."""
        return json.dumps({"schema": SCHEMA, **asdict(self)}, indent=2, allow_nan=False) + "\n"

    @staticmethod
    def from_json(text: str) -> Manifest:
        """Read what `to_json` wrote.

        Raises:
            CorruptCheckpoint: (`manifest`) not JSON, another schema, a key missing, unknown or of the wrong type.
        """
        try:
            raw = json.loads(text)
        except (ValueError, RecursionError) as exc:
            raise _damaged(f"it is not JSON ({exc})") from exc
        if not isinstance(raw, dict):
            raise _damaged(f"it is a {type(raw).__name__}, not an object")
        if raw.pop("schema", None) != SCHEMA:
            raise _damaged(f"its schema is not {SCHEMA}, the one this release reads")
        _exact_keys(raw, {f.name for f in fields(Manifest)}, "manifest")
        if not isinstance(raw["tensors"], list):
            raise _damaged("tensors is not a list")
        raw["tensors"] = tuple(_spec(entry) for entry in raw["tensors"])
        for key, kinds in _TYPES.items():
            if not isinstance(raw[key], kinds) or isinstance(raw[key], bool):
                raise _damaged(f"{key} is a {type(raw[key]).__name__}")
        if raw["version"] < 1:
            raise _damaged(f"version ({raw['version']}) must be at least 1")
        if raw["status"] not in get_args(Status):
            raise _damaged(f"status ({raw['status']!r}) is none of {', '.join(get_args(Status))}")
        return Manifest(**raw)


def plain(value: Any, where: str) -> Any:
    """A JSON-ready copy: tuples become lists, numbers of numpy and torch Python's, NaN and infinity None.

    Raises:
        ValueError: something that has no JSON form; `where` and the path inside name it.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, Sequence | set | frozenset) and not isinstance(value, bytes | bytearray):
        return [plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if not isinstance(value, int | float) and hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    raise ValueError(
        f"{where} ({type(value).__name__}) has no JSON form; pass numbers, strings, lists and mappings only"
    )


def weights_id(state_dict: Mapping[str, Tensor]) -> str:
    """The identity of a set of weights: sha256 over names, dtypes, shapes and bytes, in the order of the names.

    It depends on neither device nor insertion order. Used for `base_id`, so that a checkpoint never lands on another
    base draft.
    """
    from checkpoints.tensors import (
        state_digest,
    )  # torch takes seconds to import, and listing manifests does not need it

    return state_digest(state_dict)


_TYPES: dict[str, tuple[type, ...]] = {
    "version": (int,),
    "parent": (int, type(None)),
    "base_id": (str,),
    "tokenizer_hash": (str,),
    "scope": (str,),
    "scope_config": (dict,),
    "sha256": (str,),
    "gate": (dict,),
    "window": (dict,),
    "config": (dict,),
    "created_at": (int, float),
    "status": (str,),
    "note": (str,),
    "restored": (int, type(None)),
}

_ITEM_BYTES = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}


def _damaged(why: str) -> CorruptCheckpoint:
    return CorruptCheckpoint(
        "manifest", f"manifest.json cannot be used: {why}; restore the folder from a copy or remove the version"
    )


def _exact_keys(raw: Mapping[str, Any], expected: set[str], what: str) -> None:
    if missing := sorted(expected - raw.keys()):
        raise _damaged(f"{what} lacks {', '.join(missing)}")
    if unknown := sorted(raw.keys() - expected):
        raise _damaged(f"{what} has the unknown key {', '.join(unknown)}")


def _spec(entry: Any) -> TensorSpec:
    if not isinstance(entry, dict):
        raise _damaged("an entry of tensors is not an object")
    _exact_keys(entry, {f.name for f in fields(TensorSpec)}, "an entry of tensors")
    name, shape, dtype, digest = entry["name"], entry["shape"], entry["dtype"], entry["sha256"]
    if not isinstance(name, str) or not isinstance(digest, str | None):
        raise _damaged("a tensor's name or sha256 is not a string")
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        raise _damaged(f"the shape of {name} is not a list of sizes")
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise _damaged(f"the dtype of {name} ({dtype!r}) is none of {', '.join(_ITEM_BYTES)}")
    return TensorSpec(name, tuple(shape), dtype, digest)
