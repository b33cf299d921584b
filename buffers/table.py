"""The replay table: its contract and its value types, in Reverb's words.

A table stores and never chooses: `sample` hands the priorities of a stratum to a selector (`policies.selection`) and
reads only what that chose. Three strata:

  recent    what was served lately; first in, first out under a byte budget, and a time-to-live
  anchors   a uniform sample of everything ever inserted that is not reserved; age and priority never decide here
  reserved  traces with `reserved` set: for the gate, never trained on; in no other stratum; own byte budget, same
            time-to-live

Rules every implementation keeps (tests/contract/test_replay_table.py):

- Keys grow with insertion and are never used again. Unknown keys are ignored: the race with eviction is harmless.
- A payload that cannot be decoded is removed and counted under its reason; it never reaches the caller as an error.
- A trace evicted between choosing and reading is replaced by another draw, or left out if nothing else is there.
- Only TableUnavailable (the store) and ValueError (the caller's arguments) are raised.
- All methods may be called from several threads.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from buffers.trace import Trace

Key = int
Stratum = Literal["recent", "anchors", "reserved"]

STRATA: Final[tuple[Stratum, ...]] = ("recent", "anchors", "reserved")
#: In the result of `insert`: this trace was refused (see `TableInfo.refused_total`). No trace ever has this key.
NO_KEY: Final[Key] = 0

#: (priorities [N], n, rng) -> (indices [n] into them, probability of each draw [n])
Selector = Callable[[NDArray[np.float64], int, np.random.Generator], tuple[NDArray[np.integer], NDArray[np.floating]]]


class SampleInfo(NamedTuple):
    """What is known of one draw."""

    key: Key
    probability: float  # with which the selector drew it; 1 where nothing was drawn (`fresh`, `all`)
    priority: float
    times_sampled: int  # in this stratum, including this time
    table_size: int  # traces in the stratum when it was drawn
    stratum: Stratum


class ReplaySample(NamedTuple):
    """One drawn trace."""

    info: SampleInfo
    trace: Trace


@dataclass(frozen=True, slots=True)
class TableInfo:
    """A consistent snapshot of a table's counts. `*_total` count since the last `reset`, over all processes."""

    sizes: Mapping[Stratum, int]  # traces
    bytes: Mapping[Stratum, int]  # encoded payload bytes; a trace in recent and anchors counts in both
    stored_bytes: int  # encoded payload bytes of recent and anchors, each once: what `max_bytes` bounds
    by_domain: Mapping[Stratum, Mapping[str, int]]  # traces
    inserted_total: int
    evicted_total: int  # left recent or reserved because of a byte budget
    expired_total: int  # left recent or reserved because of the time-to-live
    sampled_total: int
    refused_total: Mapping[str, int]  # reason (too_large, schema, truncated, corrupt) -> traces
    newest_key: Key  # NO_KEY before the first insert


@dataclass(frozen=True, slots=True, kw_only=True)
class TableLimits:
    """What a table may keep."""

    max_bytes: int  # encoded payload bytes of recent and anchors together
    ttl_s: float | None  # seconds a trace stays in recent and reserved; None is for ever
    anchors: int  # traces in the reservoir; it also never takes more than half of max_bytes
    reserved_max_bytes: int  # encoded payload bytes of reserved

    def __post_init__(self) -> None:
        """Raises ValueError naming the limit that makes no sense."""
        for name in ("max_bytes", "reserved_max_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1 byte")
        if self.anchors < 0:
            raise ValueError(f"anchors ({self.anchors}) must be at least 0")
        if self.ttl_s is not None and not self.ttl_s > 0:
            raise ValueError(f"ttl_s ({self.ttl_s}) must be above 0 seconds, or None for no time-to-live")

    def largest(self, reserved: bool) -> int:
        """Bytes of the largest payload accepted. Half the budget, so that one trace never empties a stratum."""
        return (self.reserved_max_bytes if reserved else self.max_bytes) // 2


class ReplayTable(Protocol):
    """Where traces wait to be learned from. See the module docstring for the rules."""

    def insert(self, traces: Sequence[Trace], priorities: Sequence[float]) -> list[Key]:
        """Stores the traces, evicting what no longer fits; one key a trace, NO_KEY for one too large.

        Raises ValueError if the lengths differ, a priority is not finite and above 0, or a trace is inconsistent (then
        nothing of the call is stored); TableUnavailable.
        """

    def can_sample(self, n: int, stratum: Stratum = "recent") -> bool:
        """Whether the stratum holds at least n traces. Raises TableUnavailable."""

    def sample(
        self, n: int, selector: Selector, rng: np.random.Generator, stratum: Stratum = "recent"
    ) -> list[ReplaySample]:
        """n draws by the selector, fewer only if the stratum holds fewer readable traces. Raises TableUnavailable."""

    def fresh(self, since_key: Key, limit: int) -> list[ReplaySample]:
        """The newest `limit` traces of recent with a key above `since_key`, oldest of them first."""

    def all(self, stratum: Stratum, limit: int | None = None, since_key: Key = NO_KEY) -> list[ReplaySample]:
        """Every trace of a stratum with a key above `since_key`, by key; at most `limit`: the newest, or a choice of the anchors.

        Of the anchors the choice is uniform and made before `since_key` is looked at. Does not count as sampling.
        """

    def spread(self, stratum: Stratum, n: int) -> list[ReplaySample]:
        """At most n traces of a stratum by key, spread evenly from its oldest to its newest. Does not count as sampling."""

    def update_priorities(self, updates: Mapping[Key, float]) -> int:
        """Sets priorities in every stratum that holds the key; how many keys were known. Unknown ones are ignored."""

    def remove(self, keys: Sequence[Key]) -> int:
        """Removes traces from every stratum; how many were there. Unknown ones are ignored."""

    def age_out(self, target_id: str) -> int:
        """Removes every trace that another target than `target_id` judged; how many. The reservoir then starts anew."""

    def info(self) -> TableInfo:
        """The table's counts."""

    def reset(self) -> None:
        """Removes every trace and counter. Keys go on growing."""


def anchor_draw(salt: str, key: Key) -> float:
    """The lot of a trace in [0, 1): the reservoir keeps the traces with the lowest lots.

    Keeping the m lowest of independent uniform lots is a uniform sample of m without replacement (the random sort of
    Vitter, "Random sampling with a reservoir", 1985, section 2, by another name). Taking the lot from a counter instead
    of a generator makes it the same in every process and in Lua, with no state to keep: 52 bits of
    sha1("salt:key"), which a double holds exactly.
    """
    return int(hashlib.sha1(f"{salt}:{key}".encode(), usedforsecurity=False).hexdigest()[:13], 16) / 2**52
