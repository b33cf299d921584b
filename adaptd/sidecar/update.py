"""One version on its way into a server. Plain values: the publisher that passes them on has no models."""

from __future__ import annotations

from typing import NamedTuple

from checkpoints.export import UpdateFile


class Promise(NamedTuple):
    """What the gate said of a version: its relative gain in MAL over the incumbent. None: no gate judged it."""

    low: float | None
    mean: float | None


class Update(NamedTuple):
    """One version, ready to travel."""

    version: int
    #: Short name of the weights themselves, the same for every version that restores them.
    content: str
    file: UpdateFile
    promise: Promise
