"""Trace <-> bytes: safetensors, with a schema version and a checksum in the metadata. No pickle anywhere.

A payload is a valid safetensors file. Its metadata has one entry, so that the same trace always gives the same bytes:
JSON of `schema` (a whole number), `scalars` (JSON text of the fields that are not arrays, NaN as null) and `crc32` (over
that text and then the arrays in name order), because safetensors itself notices a missing byte but not a changed one.
"""

import json
import math
import zlib
from dataclasses import fields
from typing import Any, Final, cast

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from buffers.errors import CorruptTrace, SchemaMismatch, TruncatedTrace
from buffers.trace import NOT_SCALARS, Trace

#: Raise it whenever a field is added, removed or changes meaning. 2: branches; 3: they say where they begin;
#: 4: draws of the tail.
SCHEMA_VERSION: Final = 4
#: Versions that can be read, all others are refused by name. In version 1 there are no branches, in version 2 there is one
#: for each correction; none of those before 4 has draws.
_READABLE: Final = (1, 2, 3, SCHEMA_VERSION)

_METADATA_KEY: Final = "adaptd_trace"
_LENGTH_BYTES: Final = 8  # safetensors: little-endian length of the JSON header
_SCALARS: Final = {f.name: cast("type", f.type) for f in fields(Trace) if f.name not in NOT_SCALARS}


def encode(trace: Trace) -> bytes:
    """The payload of a trace. Raises ValueError if `trace.validate()` does."""
    trace.validate()
    arrays = {name: np.ascontiguousarray(a) for name, a in trace.arrays().items()}
    text = json.dumps({name: _plain(value) for name, value in trace.scalars().items()}, allow_nan=False)
    about = {"schema": SCHEMA_VERSION, "crc32": _checksum(text, arrays), "scalars": text}
    return save(arrays, {_METADATA_KEY: json.dumps(about)})


def decode(payload: bytes) -> Trace:
    """The trace of a payload.

    Raises SchemaMismatch (another schema version, or not a trace), TruncatedTrace (ends early) or CorruptTrace
    (checksum, header or contents wrong); all are TraceDecodeError with a `reason`.
    """
    size = len(payload)
    about = _about(payload)
    if about.get("schema") not in _READABLE:
        raise SchemaMismatch(f"schema {about.get('schema')!r}, this version reads {_READABLE}", n_bytes=size)
    try:
        arrays: dict[str, NDArray[Any]] = load(payload)
        text = about["scalars"]
        if about["crc32"] != _checksum(text, arrays):
            raise CorruptTrace("checksum does not match", n_bytes=size)
        if about["schema"] == 2 and "branch_lens" in arrays:
            arrays["branch_at"] = arrays["rejected_at"]
        scalars = {n: math.nan if v is None else v for n, v in json.loads(text).items()}
        _check_scalars(scalars)
        trace = Trace.of(arrays, scalars)
        trace.validate()
    except (SafetensorError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as exc:
        raise CorruptTrace(f"{type(exc).__name__}: {exc}", n_bytes=size) from exc
    return trace


def _about(payload: bytes) -> dict[str, Any]:
    """Our metadata entry of a safetensors payload, empty if it has none, once its length is what its header says."""
    size = len(payload)
    if size < _LENGTH_BYTES:
        raise TruncatedTrace("shorter than a header length", n_bytes=size)
    start = _LENGTH_BYTES + int.from_bytes(payload[:_LENGTH_BYTES], "little")
    # A JSON header opens with a brace. Without it the length before it means nothing either.
    if size > _LENGTH_BYTES and payload[_LENGTH_BYTES : _LENGTH_BYTES + 1] != b"{":
        raise SchemaMismatch("not a safetensors header", n_bytes=size)
    if start > size:
        raise TruncatedTrace(f"header needs {start} bytes", n_bytes=size)
    try:
        header = json.loads(payload[_LENGTH_BYTES:start])
        about = json.loads(header.pop("__metadata__", {}).get(_METADATA_KEY, "{}"))
        end = start + max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
        if not isinstance(about, dict):
            raise TypeError(f"{_METADATA_KEY} is not an object")
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError, RecursionError) as exc:
        raise CorruptTrace(f"unreadable header ({type(exc).__name__})", n_bytes=size) from exc
    if end > size:
        raise TruncatedTrace(f"arrays need {end} bytes", n_bytes=size)
    return about


def _plain(value: Any) -> Any:
    """A value JSON can hold: numpy scalars unwrapped, NaN (which JSON lacks) as None."""
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and math.isnan(value) else value


def _check_scalars(scalars: dict[str, Any]) -> None:
    if missing := _SCALARS.keys() - scalars.keys():
        raise KeyError(f"scalar {min(missing)} is missing")
    for name, kind in _SCALARS.items():
        allowed = (int, float) if kind is float else kind
        if not isinstance(scalars[name], allowed) or (kind is not bool and isinstance(scalars[name], bool)):
            raise TypeError(f"scalar {name} has type {type(scalars[name]).__name__}")


def _checksum(text: str, arrays: "dict[str, NDArray[Any]]") -> int:
    value = zlib.crc32(text.encode())
    for name in sorted(arrays):
        value = zlib.crc32(arrays[name].tobytes(), value)
    return value
