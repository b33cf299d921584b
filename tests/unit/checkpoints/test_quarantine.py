"""The quarantine's file: atomic, read anew by every call, and never in the way of going back."""

import json

import pytest

from checkpoints.errors import CorruptCheckpoint
from checkpoints.quarantine import Entry, QuarantineFile
from checkpoints.store import CheckpointStore


@pytest.fixture
def quarantine(store: CheckpointStore) -> QuarantineFile:
    return QuarantineFile(store.root, clock=lambda: 12.5)


def test_what_is_added_is_there_for_everybody_and_keeps_its_first_reason(quarantine: QuarantineFile) -> None:
    assert quarantine.entries() == {}
    quarantine.add({3: "acceptance fell", 4: "learned from version 3"})
    quarantine.add({3: "again", 7: "dead"})
    found = QuarantineFile(quarantine._root).entries()
    assert list(found) == [3, 4, 7]
    assert found[3] == Entry("acceptance fell", 12.5)
    quarantine.remove([4, 9])
    assert list(quarantine.entries()) == [3, 7]


def test_versions_and_quarantine_do_not_disturb_each_other(store: CheckpointStore, publish, quarantine) -> None:  # type: ignore[no-untyped-def]
    publish(1)
    quarantine.add({1: "dead"})
    publish(2)
    store.prune(1)
    assert store.recover() == []
    assert list(quarantine.entries()) == [1]
    assert store.numbers() == [1, 2]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"schema": 2, "versions": {}}', '{"schema": 1, "versions": {"x": {}}}']
)
def test_a_damaged_file_is_refused_by_name_and_set_aside_only_by_what_must_go_back(
    quarantine: QuarantineFile, text: str
) -> None:
    quarantine.add({3: "acceptance fell"})
    path = quarantine._root / "quarantine.json"
    path.write_text(text)
    for attempt in (quarantine.entries, lambda: quarantine.remove([3])):
        with pytest.raises(CorruptCheckpoint, match=r"quarantine\.json"):
            attempt()
    quarantine.add({5: "dead"})
    assert list(quarantine.entries()) == [5]
    assert path.with_name("quarantine.json.damaged").read_text() == text
    assert json.loads(path.read_text())["schema"] == 1
