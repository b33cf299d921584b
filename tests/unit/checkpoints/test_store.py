"""The store publishes whole versions, goes back by publishing again, and refuses what is damaged."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from checkpoints import atomic
from checkpoints.errors import CheckpointNotFound, CorruptCheckpoint, StoreUnavailable, Superseded
from checkpoints.store import CheckpointStore

Publish = Callable[..., Any]


def test_a_new_store_is_at_day_0_and_looking_at_it_creates_nothing(store: CheckpointStore) -> None:
    assert store.current() is None
    assert store.versions() == []
    assert store.recover() == []
    assert not store.root.exists()


def test_published_tensors_come_back_bit_for_bit(
    store: CheckpointStore, publish: Publish, state: Callable[[int], Any], same: Callable[..., bool]
) -> None:
    manifest = publish(1)
    loaded, tensors = store.load(store.current() or 0)
    assert same(tensors, state(1))
    assert loaded == manifest
    assert (manifest.version, manifest.parent, manifest.status) == (1, None, "promoted")
    assert manifest.scope_config == {"rank": 8, "targets": ["q_proj", "v_proj"]}
    assert manifest.created_at == 1_700_000_000.5
    assert [spec.name for spec in manifest.tensors] == sorted(state(1))


def test_each_version_is_a_child_of_the_one_before(store: CheckpointStore, publish: Publish) -> None:
    for seed in range(3):
        publish(seed)
    assert [(m.version, m.parent) for m in store.versions()] == [(1, None), (2, 1), (3, 2)]
    assert store.current() == 3


def test_tensors_that_are_views_of_one_storage_or_not_contiguous_are_published_as_values(
    store: CheckpointStore, provenance: dict[str, Any]
) -> None:
    """safetensors refuses shared storage, and a fused layer's parts are views of it."""
    fused = torch.arange(12.0).reshape(3, 4)
    store.publish({"a": fused[:2], "b": fused[1:], "c": fused.t()}, **provenance)
    _, tensors = store.load(1)
    assert torch.equal(tensors["b"], fused[1:])
    assert torch.equal(tensors["c"], fused.t())


def test_a_learner_that_diverged_cannot_publish_nan(store: CheckpointStore, provenance: dict[str, Any]) -> None:
    with pytest.raises(CorruptCheckpoint, match="weight holds NaN") as refused:
        store.publish({"weight": torch.tensor([1.0, float("nan")])}, **provenance)
    assert refused.value.reason == "not_finite"
    assert store.current() is None
    assert os.listdir(store.root) == [".lock"]


def test_publishing_no_tensors_is_refused_with_the_remedy(store: CheckpointStore, provenance: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="rollback"):
        store.publish({}, **provenance)


def test_promoting_an_old_version_publishes_its_tensors_again_as_a_child_of_current(
    store: CheckpointStore, publish: Publish, state: Callable[[int], Any], same: Callable[..., bool]
) -> None:
    for seed in (1, 2, 3):
        publish(seed)
    manifest = store.promote(1)
    assert (manifest.version, manifest.parent, manifest.restored, manifest.status) == (4, 3, 1, "promoted")
    assert same(store.load(4)[1], state(1))
    assert same(store.load(1)[1], state(1))


def test_promoting_the_current_version_changes_nothing(store: CheckpointStore, publish: Publish) -> None:
    publish(1)
    assert store.promote(1).version == 1
    assert store.current() == 1


def test_rolling_back_again_and_again_walks_to_day_0_and_never_returns_to_the_bad_version(
    store: CheckpointStore, publish: Publish, state: Callable[[int], Any], same: Callable[..., bool]
) -> None:
    """With the parent of a rollback set to CURRENT, a second rollback would bring the bad version back."""
    for seed in (1, 2, 3):
        publish(seed)
    second = store.rollback()
    assert (second.version, second.restored, second.status) == (4, 2, "rolled_back")
    assert same(store.load(4)[1], state(2))
    first = store.rollback()
    assert (first.version, first.restored) == (5, 1)
    assert same(store.load(5)[1], state(1))
    base = store.rollback()
    assert (base.version, base.restored, base.is_reset, base.scope) == (6, 0, True, "lora")
    assert store.load(6) == (base, {})
    with pytest.raises(CheckpointNotFound, match="already is the base draft"):
        store.rollback()
    assert store.current() == 6


def test_after_a_rollback_learning_goes_on_from_there(store: CheckpointStore, publish: Publish) -> None:
    publish(1)
    store.rollback()
    assert (publish(2).version, publish(3).parent) == (3, 3)
    assert store.rollback().restored == 3
    assert store.rollback().is_reset


def test_rolling_back_a_promotion_returns_to_what_served_before_it(store: CheckpointStore, publish: Publish) -> None:
    for seed in (1, 2):
        publish(seed)
    store.promote(1)
    assert store.rollback().restored == 2


def test_there_is_nothing_to_roll_back_on_day_0(store: CheckpointStore) -> None:
    with pytest.raises(CheckpointNotFound, match="holds no version yet"):
        store.rollback()


def test_pruning_keeps_the_newest_and_what_a_rollback_needs(store: CheckpointStore, publish: Publish) -> None:
    for seed in range(5):
        publish(seed)
    store.rollback()  # version 6: tensors of 4, parent 3
    assert store.prune(2) == [1, 2, 4]
    assert store.numbers() == [3, 5, 6]
    assert store.rollback().restored == 3
    with pytest.raises(ValueError, match=r"keep \(0\)"):
        store.prune(0)


@pytest.mark.parametrize("version", [0, 2, -1])
def test_a_version_that_does_not_exist_is_refused_by_name(
    store: CheckpointStore, publish: Publish, version: int
) -> None:
    publish(1)
    for attempt in (store.load, store.promote, store.manifest):
        with pytest.raises(CheckpointNotFound, match=f"version {version} is not in"):
            attempt(version)
    assert store.current() == 1


def test_a_truncated_file_is_refused_at_every_length(store: CheckpointStore, publish: Publish) -> None:
    publish(1)
    path = store.root / "v000001" / "draft.safetensors"
    whole = path.read_bytes()
    for length in (0, 7, 8, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CorruptCheckpoint, match=f"{length} bytes") as refused:
            store.load(1)
        assert refused.value.reason == "sha256"
    path.write_bytes(whole)
    assert store.load(1)[0].version == 1


def test_one_flipped_bit_is_refused_and_a_missing_file_too(store: CheckpointStore, publish: Publish) -> None:
    publish(1)
    path = store.root / "v000001" / "draft.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptCheckpoint, match="truncated or overwritten"):
        store.load(1)
    path.unlink()
    with pytest.raises(CorruptCheckpoint, match="is missing"):
        store.load(1)


def test_a_damaged_parent_is_not_rolled_back_to(store: CheckpointStore, publish: Publish) -> None:
    publish(1)
    publish(2)
    (store.root / "v000001" / "draft.safetensors").write_bytes(b"")
    for attempt in (store.rollback, lambda: store.promote(1)):
        with pytest.raises(CorruptCheckpoint):
            attempt()
    assert store.current() == 2


def test_a_manifest_in_the_folder_of_another_version_is_refused(store: CheckpointStore, publish: Publish) -> None:
    publish(1)
    publish(2)
    first, second = store.root / "v000001" / "manifest.json", store.root / "v000002" / "manifest.json"
    second.write_text(first.read_text())
    with pytest.raises(CorruptCheckpoint, match="is the manifest of version 1"):
        store.load(2)
    second.write_bytes(b"\xff\xfe")
    with pytest.raises(CorruptCheckpoint, match="is not text"):
        store.load(2)
    second.unlink()
    with pytest.raises(CorruptCheckpoint, match="is missing"):
        store.load(2)


@pytest.mark.parametrize("text", ["", "v1", "v000001/../..", "latest", "v000001\nv000002"])
def test_a_current_that_names_no_version_is_refused_by_name(
    store: CheckpointStore, publish: Publish, text: str
) -> None:
    publish(1)
    (store.root / "CURRENT").write_text(text)
    with pytest.raises(CorruptCheckpoint, match="CURRENT holds") as refused:
        store.current()
    assert refused.value.reason == "current"


def test_a_lost_current_is_reported_instead_of_starting_over(store: CheckpointStore, publish: Publish) -> None:
    """Starting over at version 1 would overwrite what is there."""
    publish(1)
    publish(2)
    (store.root / "CURRENT").unlink()
    for attempt in (store.current, lambda: publish(3)):
        with pytest.raises(CorruptCheckpoint, match="v000002 exists"):
            attempt()
    assert (store.root / "v000001").is_dir()


def test_a_second_writer_waits_and_then_is_refused_by_name(store: CheckpointStore, publish: Publish) -> None:
    publish(1)
    with (
        atomic.exclusive(store.root / ".lock", 1.0),
        pytest.raises(StoreUnavailable, match="held by another writer"),
    ):
        publish(2)
    assert publish(2).version == 2


def test_writers_in_several_threads_get_numbers_without_gaps(
    store: CheckpointStore, provenance: dict[str, Any]
) -> None:
    patient = CheckpointStore(store.root, lock_timeout_s=20.0)

    def write(seed: int) -> None:
        for _ in range(3):
            patient.publish({"w": torch.full((3,), float(seed))}, **provenance)

    threads = [threading.Thread(target=write, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [(m.version, m.parent or 0) for m in store.versions()] == [(n, n - 1) for n in range(1, 10)]


def test_a_folder_that_cannot_be_written_is_refused_by_name(
    tmp_path: Any, provenance: dict[str, Any], state: Callable[[int], Any]
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(StoreUnavailable, match="check that it is writable"):
        CheckpointStore(blocked / "checkpoints").publish(state(1), **provenance)


def test_another_user_may_read_a_published_version(store: CheckpointStore, publish: Publish) -> None:
    publish(1)
    assert stat.S_IMODE((store.root / "v000001").stat().st_mode) == 0o755


def test_rolling_back_to_a_version_skips_those_in_between_and_says_why(
    store: CheckpointStore, publish: Publish, state: Callable[[int], Any], same: Callable[..., bool]
) -> None:
    for seed in (1, 2, 3):
        publish(seed)
    back = store.rollback(1, "acceptance fell")
    assert (back.version, back.restored, back.parent, back.status) == (4, 1, None, "rolled_back")
    assert back.note == "the tensors of version 1; acceptance fell"
    assert same(store.load(4)[1], state(1))
    assert store.rollback(4).version == 4, "it serves already"
    base = store.rollback(0, "so did that")
    assert (base.is_reset, base.parent, base.note) == (True, None, "the base draft, as on day 0; so did that")
    with pytest.raises(CheckpointNotFound):
        store.rollback(9)
    assert store.current() == 5


def test_what_was_learned_from_one_version_does_not_become_the_child_of_another(
    store: CheckpointStore, publish: Publish
) -> None:
    """A learner that is in the middle of a tick when its version is rolled back."""
    publish(1, over=0)
    publish(2, over=1)
    store.rollback()
    with pytest.raises(Superseded, match="version 3 serves, not 2"):
        publish(4, over=2)
    assert store.current() == 3
    assert publish(4, over=3).parent == 3


def test_a_version_that_may_have_to_come_back_is_not_pruned(store: CheckpointStore, publish: Publish) -> None:
    for seed in range(6):
        publish(seed)
    assert store.prune(1, also=(2, 77)) == [1, 3, 4]
    assert store.numbers() == [2, 5, 6]
