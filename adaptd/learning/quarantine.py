"""What live traffic refused and what was learned from it: kept beside the store, asked before every promotion.

Imports no torch: `adaptd checkpoints list` answers at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

from adaptd.errors import VersionQuarantined
from checkpoints.errors import CheckpointNotFound, CorruptCheckpoint
from checkpoints.manifest import Manifest
from checkpoints.quarantine import QuarantineFile
from checkpoints.store import CheckpointStore
from policies.canary import Quarantine


def quarantine_file(store: CheckpointStore) -> QuarantineFile:
    """The file of a store."""
    return QuarantineFile(store.root)


def lineage(manifests: Iterable[Manifest]) -> dict[int, int | None]:
    """What each version was learned from, by version: its parent, or the version whose tensors it repeats (0: day 0)."""
    return {m.version: m.parent if m.restored is None else m.restored for m in manifests}


def refusals(store: CheckpointStore) -> dict[int, str]:
    """Published versions that may not be promoted, with the reason.

    Raises:
      CorruptCheckpoint: the quarantine cannot be read.
    """
    quarantine, parents = _read(store)
    found = {version: quarantine.refusal(version, parents) for version in parents}
    return {version: reason for version, reason in found.items() if reason}


def promote(store: CheckpointStore, version: int, *, force: bool = False) -> Manifest:
    """Publish an earlier version again, unless it is quarantined; `force` lifts that first.

    Raises:
      VersionQuarantined: it is, or comes from one that is. CheckpointError: as `CheckpointStore.promote`.
    """
    quarantine, parents = _read(store)
    if force:
        store.load(version)  # nothing is lifted for a version that cannot be promoted
        quarantine_file(store).remove(quarantine.lift(version, parents))
    elif refusal := quarantine.refusal(version, parents):
        raise VersionQuarantined(f"{refusal}; promote it with --force (`force` over HTTP) if that is no longer true")
    return store.promote(version)


def roll_back(store: CheckpointStore) -> Manifest:
    """Publish the live version's parent again; one that is quarantined is passed over, for the one that it came from.

    Raises:
      CheckpointError: as `CheckpointStore.rollback`.
    """
    current = store.current()
    if current is None:
        return store.rollback()
    quarantine, parents = _read(store)
    to = store.manifest(current).parent
    while to and quarantine.refusal(to, parents):
        to = parents.get(to)
    return store.rollback(to or 0)


def take_back(store: CheckpointStore, to: int, refused: Sequence[int], reason: str) -> Manifest:
    """Quarantine versions and everything learned from them, then publish version `to` (0: day 0) again.

    The descendants are entered one by one, because pruning may remove the versions in between. Where none of them serves,
    nothing is published. A `to` that is gone or damaged costs what it had learned: day 0 serves.

    Returns: the manifest of what serves.
    Raises:
      CheckpointError: the store cannot be written.
    """
    quarantine = Quarantine(dict.fromkeys(refused, reason))
    reasons = {version: reason for version in refused if version > 0}
    for _ in range(2):
        parents = lineage(_manifests(store))
        for version in parents:
            if version not in reasons and quarantine.refusal(version, parents):
                reasons[version] = f"learned from version {_nearest(version, refused, parents)}"
        quarantine_file(store).add(reasons)
        if (current := store.current() or 0) in (0, *parents):
            break  # else a tick published since the versions were read
    if current not in reasons:
        return store.manifest(current)
    note = f"version {', '.join(map(str, refused))} was rolled back: {reason}"
    try:
        return store.rollback(to, note)
    except (CheckpointNotFound, CorruptCheckpoint):
        if not to:
            raise
        return store.rollback(0, note)


def _read(store: CheckpointStore) -> tuple[Quarantine, dict[int, int | None]]:
    entries = quarantine_file(store).entries()
    return Quarantine({version: entry.reason for version, entry in entries.items()}), lineage(_manifests(store))


def _manifests(store: CheckpointStore) -> Iterator[Manifest]:
    """Those that can be read: a damaged one must not keep a regression at work."""
    for number in store.numbers():
        with contextlib.suppress(CorruptCheckpoint, CheckpointNotFound):
            yield store.manifest(number)


def _nearest(version: int, refused: Sequence[int], parents: Mapping[int, int | None]) -> int | None:
    at: int | None = version
    while at and at not in refused:
        at = parents.get(at)
    return at
