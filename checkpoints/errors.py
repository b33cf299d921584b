"""Errors of the checkpoint store and the swap.

    CheckpointError
    |- IncompatibleCheckpoint    an intact checkpoint, but not one for this draft
    |- CorruptCheckpoint         the bytes, the manifest or the values are damaged
    |- CheckpointNotFound        the version does not exist, or there is nothing to roll back to
    |- Superseded                another version serves than the one that a new one was learned from
    `- StoreUnavailable          the folder cannot be read or written, or another writer holds its lock

A refusal carries `reason`, one slug of `Reason`, for the counter of refused swaps; the message names the value, the
rule and the remedy.
"""

from __future__ import annotations

from typing import Literal

Reason = Literal[
    "base",  # trained on another base draft
    "tokenizer",  # trained with another vocabulary
    "missing",  # a tensor the draft needs is absent
    "unexpected",  # a tensor the draft does not have
    "shape",
    "dtype",
    "not_finite",  # NaN or infinity
    "sha256",  # the bytes are not those that were published (truncated, overwritten)
    "manifest",  # manifest.json is absent, unreadable or contradicts the tensors
    "current",  # CURRENT names no complete version
    "quarantine",  # quarantine.json is unreadable
]


class CheckpointError(Exception):
    """Base of every expected failure of this package."""


class _Refusal(CheckpointError):
    """A refusal with its reason; both survive pickling, so that they cross process boundaries."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(reason, message)
        self.reason: Reason = reason

    def __str__(self) -> str:
        message: str = self.args[1]
        return message


class IncompatibleCheckpoint(_Refusal):
    """The checkpoint is intact but was made for another base draft, vocabulary or set of trainable tensors."""


class CorruptCheckpoint(_Refusal):
    """The checkpoint's bytes, manifest or values are damaged; nothing of it may reach a model."""


class CheckpointNotFound(CheckpointError):
    """The store holds no such version, or nothing earlier to roll back to."""


class Superseded(CheckpointError):
    """Another version serves than the one that the new one was learned from: its writer has to follow first."""


class StoreUnavailable(CheckpointError):
    """The store's folder cannot be read or written, or another process holds the writer lock for too long."""
