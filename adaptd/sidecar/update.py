"""One version on its way into a server. Plain values: the publisher that passes them on has no models."""

from __future__ import annotations

from typing import NamedTuple

from checkpoints.export import UpdateFile


class Promise(NamedTuple):
    """What the gate said of a version: its relative gain in MAL over the incumbent of that time."""

    #: Lower bound of the gain; None: no gate judged it, or what it said was of another incumbent.
    low: float | None = None
    #: The incumbent that it was compared with; 0 is day 0.
    over: int = 0


class Update(NamedTuple):
    """One version, ready to travel."""

    version: int
    #: Short name of the weights themselves, the same for every version that restores them.
    content: str
    file: UpdateFile
    promise: Promise
