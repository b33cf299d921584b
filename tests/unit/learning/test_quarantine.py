"""Going back, and what may not come again: over a real store with tiny tensors."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from adaptd.errors import VersionQuarantined
from adaptd.learning.quarantine import promote, quarantine_file, refusals, roll_back, take_back
from checkpoints.manifest import Manifest
from checkpoints.quarantine import QuarantineFile
from checkpoints.store import CheckpointStore


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path)


def publish(store: CheckpointStore, value: float) -> Manifest:
    about = {"gate": {}, "window": {}, "config": {}, "scope_config": {}}
    return store.publish({"w": torch.full((2,), value)}, base_id="b", tokenizer_hash="t", scope="lora", **about)


def serving(store: CheckpointStore) -> float:
    return float(store.load(store.current() or 0)[1]["w"][0])


def test_a_chain_goes_back_to_what_was_before_it_and_is_quarantined_whole(store: CheckpointStore) -> None:
    for value in (1, 2, 3):
        publish(store, value)
    manifest = take_back(store, 1, [2, 3], "acceptance fell")
    assert (manifest.version, serving(store)) == (4, 1.0)
    assert "version 2, 3 was rolled back: acceptance fell" in manifest.note
    assert set(refusals(store)) == {2, 3}
    for version in (2, 3):
        with pytest.raises(VersionQuarantined, match=f"version {version} is quarantined"):
            promote(store, version)
    assert promote(store, 1).version == 5


def test_what_was_published_meanwhile_goes_back_too_and_stays_quarantined_without_its_ancestors(
    store: CheckpointStore,
) -> None:
    """A tick may publish a child of the refused version before the daemon gets to it; pruning then cuts the line."""
    for value in (1, 2, 3):
        publish(store, value)
    assert take_back(store, 1, [2], "acceptance fell").version == 4
    assert serving(store) == 1.0
    shutil.rmtree(store.root / "v000002")
    with pytest.raises(VersionQuarantined, match="learned from version 2"):
        promote(store, 3)
    assert publish(store, 5).version == 5
    assert 5 not in refusals(store), "learning goes on from what was restored"


def test_a_child_that_is_published_while_its_parent_is_taken_back_goes_back_too(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(store, 1)
    publish(store, 2)
    add, children = QuarantineFile.add, []

    def late(file: QuarantineFile, reasons: Mapping[int, str]) -> None:
        if not children:  # the versions have been read, nothing is entered yet
            children.append(publish(store, 3))
        add(file, reasons)

    monkeypatch.setattr(QuarantineFile, "add", late)
    assert take_back(store, 1, [2], "acceptance fell").version == 4
    assert serving(store) == 1.0
    assert set(refusals(store)) == {2, 3}


def test_nothing_goes_back_when_somebody_went_back_already(store: CheckpointStore) -> None:
    publish(store, 1)
    publish(store, 2)
    store.rollback()
    assert take_back(store, 1, [2], "acceptance fell").version == 3
    assert store.current() == 3
    assert set(refusals(store)) == {2}


def test_without_the_version_to_go_back_to_day_0_serves(store: CheckpointStore) -> None:
    publish(store, 1)
    publish(store, 2)
    (store.root / "v000001" / "draft.safetensors").write_bytes(b"damaged")
    assert take_back(store, 1, [2], "acceptance fell").is_reset


def test_a_damaged_manifest_keeps_no_regression_at_work(store: CheckpointStore) -> None:
    for value in (1, 2, 3):
        publish(store, value)
    (store.root / "v000001" / "manifest.json").write_text("{")
    (store.root / "quarantine.json").write_text("{")
    take_back(store, 2, [3], "acceptance fell")
    assert serving(store) == 2.0
    assert list(quarantine_file(store).entries()) == [3]


def test_a_version_under_a_new_number_is_the_same_tensors(store: CheckpointStore) -> None:
    publish(store, 1)
    publish(store, 2)
    again = promote(store, 1).version
    publish(store, 4)
    take_back(store, 2, [again], "acceptance fell")
    assert set(refusals(store)) >= {again, 4}
    with pytest.raises(VersionQuarantined):
        promote(store, again)


def test_force_lifts_the_quarantine_of_the_line(store: CheckpointStore) -> None:
    for value in (1, 2, 3):
        publish(store, value)
    take_back(store, 0, [2], "acceptance fell")
    assert promote(store, 3, force=True).version == 5
    assert serving(store) == 3.0
    assert refusals(store) == {}


def test_nothing_is_lifted_for_a_version_that_cannot_be_promoted(store: CheckpointStore) -> None:
    publish(store, 1)
    publish(store, 2)
    take_back(store, 1, [2], "acceptance fell")
    (store.root / "v000002" / "draft.safetensors").write_bytes(b"damaged")
    with pytest.raises(Exception, match="sha256"):
        promote(store, 2, force=True)
    assert set(refusals(store)) == {2}


def test_rolling_back_by_hand_passes_over_what_is_quarantined(store: CheckpointStore) -> None:
    for value in (1, 2, 3):
        publish(store, value)
    quarantine_file(store).add({2: "refused elsewhere"})
    assert roll_back(store).restored == 1
