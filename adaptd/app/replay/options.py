"""Everything that the command line of `adaptd replay` says beside the configuration."""

from __future__ import annotations

from dataclasses import dataclass, field

from adaptd.app.replay.lessons import TeachingOptions
from adaptd.ingest.read import Reading
from adaptd.ingest.select import Selection


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayOptions:
    """What to read, who teaches, what is kept, what is reported."""

    reading: Reading = field(default_factory=Reading)
    teaching: TeachingOptions = field(default_factory=TeachingOptions)
    limit: int | None = None
    since: float | None = None
    """Unix seconds; `since_said` is what was asked for, an age perhaps."""
    since_said: str | None = None
    sample: float | None = None
    """Below 1 a share of the records, else a number of them."""
    budget: int | None = None
    select: Selection = "shift"
    holdout: float = 0.1
    """Share of the records that is only ever evaluated, never learned from or judged on."""
    max_held: int = 1000
    oracle: bool = False
    dry_run: bool = False
    fresh: bool = False
