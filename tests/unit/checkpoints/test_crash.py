"""Whatever moment a writer dies at, CURRENT names a complete, verified version."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from checkpoints import atomic
from checkpoints.errors import CheckpointNotFound, StoreUnavailable
from checkpoints.store import CheckpointStore

KILLS = 50


def assert_whole(store: CheckpointStore, version: int) -> None:
    """The version can be loaded and verified, and all its values belong together."""
    manifest, tensors = store.load(version)
    values = {float(end) for tensor in tensors.values() for end in (tensor.min(), tensor.max())}
    assert len(values) <= 1, f"version {version} mixes the tensors of {values}"
    assert manifest.restored is not None or values == {float(version)}


def has_leftovers(store: CheckpointStore) -> bool:
    """Whether the last writer died inside a publication."""
    names = os.listdir(store.root) if store.root.is_dir() else []
    current = store.current() or 0
    return any(name.startswith(".tmp-") or (name.startswith("v") and int(name[1:]) > current) for name in names)


def test_fifty_kills_at_random_moments_leave_current_complete_and_verified(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints")
    rng = random.Random(20261122)
    highest, unfinished, longest_s = 0, 0, 0.1
    with subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("publisher.py")), str(store.root)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1"},
    ) as publisher:
        assert publisher.stdin is not None
        assert publisher.stdout is not None
        assert publisher.stdout.readline().strip() == "ready"
        for _ in range(KILLS):
            publisher.stdin.write("fork\n")
            publisher.stdin.flush()
            child = int(publisher.stdout.readline())
            time.sleep(rng.uniform(0.0, longest_s))
            os.kill(child, signal.SIGKILL)
            assert publisher.stdout.readline().strip() == str(-signal.SIGKILL), "the publisher ended by itself"
            current = store.current() or 0
            if current:
                assert_whole(store, current)
            assert current >= highest, "CURRENT went back"
            # The lives of publishers follow the speed of the machine: about one publication each, with kills all over it.
            longest_s *= 1.25 if current == highest else 0.8 if current > highest + 1 else 1.0
            highest = current
            unfinished += has_leftovers(store)
        publisher.stdin.close()
        assert publisher.wait(timeout=60) == 0
    print(f"{KILLS} kills, {unfinished} of them inside a publication; CURRENT names version {highest}")
    assert highest >= KILLS // 2, "the publishers hardly published; the proof would be empty"
    assert unfinished >= KILLS // 5, "hardly a kill fell inside a publication; the proof would be empty"
    store.recover()
    assert not has_leftovers(store)
    assert store.current() == highest == store.numbers()[-1]
    for version in store.numbers():
        assert_whole(store, version)


class Killed(BaseException):
    """Stands for the end of the process at a chosen file operation."""


OPERATIONS = ("fsync", "rename", "replace", "mkdir", "open")


@pytest.mark.parametrize("before", [0, 1, 2])
def test_a_writer_that_dies_before_any_one_of_its_file_operations_harms_nothing(
    tmp_path: Path,
    provenance: dict[str, Any],
    state: Callable[[int], Any],
    same: Callable[..., bool],
    monkeypatch: pytest.MonkeyPatch,
    before: int,
) -> None:
    """Kill signals sample the moments; this walks through every one of them, on day 0 and later."""
    origin = CheckpointStore(tmp_path / "origin")
    for seed in range(before):
        origin.publish(state(seed), **provenance)
    origin.recover()
    step, finished = 0, False
    while not finished:
        root = tmp_path / f"step{step}"
        if origin.root.exists():
            shutil.copytree(origin.root, root)
        countdown = step

        def dying(operation: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **keywords: Any) -> Any:
                nonlocal countdown
                countdown -= 1
                if countdown < 0:
                    raise Killed
                return operation(*args, **keywords)

            return call

        store = CheckpointStore(root)
        with monkeypatch.context() as patch:
            for name in OPERATIONS:
                patch.setattr(os, name, dying(getattr(os, name)))
            patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # a dead process cleans nothing up
            try:
                store.publish(state(before), **provenance)
                finished = True
            except Killed:
                pass
        current = store.current() or 0
        assert current in (before, before + 1)
        assert finished <= (current == before + 1)
        if current:
            assert same(store.load(current)[1], state(current - 1))
        following = store.publish(state(7), **provenance)
        assert following.version == current + 1
        assert sorted(store.numbers()) == list(range(1, current + 2))
        assert not [path for path in root.iterdir() if path.name.startswith(".tmp-")]
        step += 1
    assert step > 8, "the walk met too few operations to mean anything"


def test_everything_is_durable_before_current_names_it(
    store: CheckpointStore, publish: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill cannot show a missing fsync, only a power cut can: so the order of operations is checked itself."""
    publish(1)
    log: list[str] = []
    sync, rename, replace = atomic.sync, os.rename, os.replace

    def short(path: Any) -> str:
        name = Path(path).name
        return "folder" if name.startswith(".tmp-v") else "root" if Path(path) == store.root else name

    monkeypatch.setattr(atomic, "sync", lambda path: (log.append(f"sync {short(path)}"), sync(path)))
    monkeypatch.setattr(os, "rename", lambda a, b: (log.append(f"rename {short(a)} {short(b)}"), rename(a, b)))
    monkeypatch.setattr(os, "replace", lambda a, b: (log.append(f"replace {short(b)}"), replace(a, b)))
    publish(2)
    assert log == [
        "sync draft.safetensors",
        "sync manifest.json",
        "sync folder",
        "rename folder v000002",
        "sync root",
        "sync .tmp-CURRENT",
        "replace CURRENT",
        "sync root",
    ]


def test_a_full_disk_leaves_the_old_version_serving_and_no_rubbish(
    store: CheckpointStore, publish: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(1)

    def full(_: Path) -> None:
        raise OSError(28, "No space left on device", "draft.safetensors")

    with monkeypatch.context() as patch:
        patch.setattr(atomic, "sync", full)
        with pytest.raises(StoreUnavailable, match="No space left on device"):
            publish(2)
    assert store.current() == 1
    assert sorted(os.listdir(store.root)) == [".lock", "CURRENT", "v000001"]
    assert publish(2).version == 2


def test_a_version_above_current_was_never_published_and_gives_way(
    store: CheckpointStore, publish: Callable[..., Any], state: Callable[[int], Any], same: Callable[..., bool]
) -> None:
    publish(1)
    publish(2)
    (store.root / "CURRENT").write_text("v000001\n")  # as if the writer had died between rename and commit
    with pytest.raises(CheckpointNotFound):
        store.load(2)
    assert [manifest.version for manifest in store.versions()] == [1]
    assert publish(3).version == 2
    assert same(store.load(2)[1], state(3))


def test_recover_clears_what_a_dead_writer_left(store: CheckpointStore, publish: Callable[..., Any]) -> None:
    publish(1)
    (store.root / ".tmp-v000002-abc").mkdir()
    (store.root / ".tmp-CURRENT").write_text("v0000")
    (store.root / "v000002").mkdir()
    assert store.recover() == [".tmp-CURRENT", ".tmp-v000002-abc", "v000002"]
    assert store.current() == 1
