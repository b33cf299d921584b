"""Errors of the replay buffer.

ReplayError
├── TableUnavailable      the store cannot be reached, refuses writes, or could not be started
└── TraceDecodeError      bytes that are not a trace this version can read; `.reason` says why
    ├── SchemaMismatch    reason "schema": written by another schema version, or not a trace at all
    ├── TruncatedTrace    reason "truncated": shorter than its own header promises
    └── CorruptTrace      reason "corrupt": checksum, header or array contents are wrong

Wrong arguments are plain ValueError: they are bugs of the caller, not conditions of the store.
"""

from typing import ClassVar


class ReplayError(Exception):
    """Base of everything the `buffers` package raises on purpose, except ValueError."""


class TableUnavailable(ReplayError):
    """The store behind a table does not answer or does not accept writes. Trying again later is safe."""


class TraceDecodeError(ReplayError):
    """A payload is not a readable trace. Tables catch this, count it under `reason` and remove the payload."""

    reason: ClassVar[str] = "corrupt"

    def __init__(self, detail: str, *, n_bytes: int) -> None:
        super().__init__(f"trace payload of {n_bytes} bytes refused ({self.reason}): {detail}")
        self.n_bytes = n_bytes


class SchemaMismatch(TraceDecodeError):
    """The payload was written by another schema version."""

    reason: ClassVar[str] = "schema"


class TruncatedTrace(TraceDecodeError):
    """The payload ends before its header says it should."""

    reason: ClassVar[str] = "truncated"


class CorruptTrace(TraceDecodeError):
    """The payload has the right length and schema, and wrong contents."""

    reason: ClassVar[str] = "corrupt"
