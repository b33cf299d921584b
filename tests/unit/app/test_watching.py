"""The watch as a daemon runs it, over a real store: what goes back, what is written, what a restart remembers."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from adaptd.app.watching import Watching
from adaptd.config import GateConfig
from adaptd.learning.quarantine import refusals
from adaptd.report.monitor import Finished, Monitor
from checkpoints.errors import StoreUnavailable
from checkpoints.store import CheckpointStore

K = 4


class Rig:
    """A store, a monitor with a hundred requests half accepted, and the watch over them."""

    def __init__(self, home: Path, **gate: Any) -> None:
        self.store = CheckpointStore(home / "checkpoints")
        self.monitor = Monitor(K, 1e-9)
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.followed: list[str] = []
        self.watching = Watching(
            GateConfig(**gate),
            self.store,
            home / "watch.json",
            windows=self.monitor.windows,
            remember=lambda kind, **about: self.events.append((kind, about)),
            went_back=self.followed.append,
        )
        for i in range(100):
            self.monitor.observe(request(0, 9 + 2 * (i % 2)))

    def publish(self, gain: float | None = None) -> int:
        gate = {} if gain is None else {"gain": {"mean": gain, "low": gain, "high": gain}}
        about: dict[str, Any] = {"window": {}, "config": {}, "scope_config": {}, "gate": gate}
        tensors = {"w": torch.full((2,), float((self.store.current() or 0) + 1))}
        version = self.store.publish(tensors, base_id="b", tokenizer_hash="t", scope="lora", **about).version
        self.watching.promoted(version, K)
        return version

    async def serve(self, version: int, accepted: int, n: int) -> None:
        for _ in range(n):
            self.watching.observe(request(version, accepted))
            await asyncio.sleep(0)
        if self.watching._task is not None:
            await self.watching._task

    @property
    def kinds(self) -> list[str]:
        return [kind for kind, _ in self.events]


def request(version: int, accepted: int) -> Finished:
    """Five rounds of four proposals."""
    return Finished("d", 5 + accepted, 5, 20, accepted, (), (), version)


def test_a_regression_goes_back_is_told_and_is_quarantined(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    first = rig.publish()
    asyncio.run(rig.serve(first, 10, 400))
    assert rig.kinds == ["confirmed"]
    second = rig.publish()
    asyncio.run(rig.serve(second, 4, 400))
    assert rig.kinds == ["confirmed", "rollback"]
    about = rig.events[-1][1]
    assert (about["version"], about["refused"]) == (3, [2])
    assert (rig.store.current(), rig.store.manifest(3).restored) == (3, 1)
    assert "accepted" in rig.store.manifest(3).note
    assert set(refusals(rig.store)) == {2}
    assert len(rig.followed) == 1
    status = rig.watching.status()
    assert (list(status["quarantined"]), status["rolled_back"], status["watching"]) == (["2"], 1, [])


def test_a_chain_of_small_losses_is_found_though_each_promotion_sees_the_one_before(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    for accepted in (9, 8, 7, 6, 5):
        version = rig.publish()
        for _ in range(100):
            rig.monitor.observe(request(version, accepted))
        asyncio.run(rig.serve(version, accepted, 25))
        if "rollback" in rig.kinds:
            break
    assert rig.kinds == ["rollback"]
    assert rig.store.manifest(rig.store.current() or 0).is_reset, "day 0 was before the first unconfirmed version"
    assert set(refusals(rig.store)) == set(range(1, version + 1))


def test_a_promise_that_is_not_kept_is_told_and_costs_nothing(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    version = rig.publish(gain=0.5)
    asyncio.run(rig.serve(version, 11, 400))
    assert rig.kinds == ["confirmed"]
    assert rig.events[0][1]["promise"] == "broken"
    assert rig.watching.status()["promised_gain"] == 0.5
    assert rig.store.current() == version


def test_a_restart_goes_on_watching_against_what_was_before(tmp_path: Path) -> None:
    Rig(tmp_path).publish()
    again = Rig(tmp_path)
    again.watching.resume()
    assert again.watching.before == (0,)
    asyncio.run(again.serve(1, 3, 400))
    assert again.kinds == ["rollback"]


@pytest.mark.parametrize("text", ["", "{}", '{"members": "x", "safe": 0, "windows": {}}'])
def test_a_damaged_file_is_as_none(tmp_path: Path, text: str) -> None:
    rig = Rig(tmp_path)
    rig.publish()
    (tmp_path / "watch.json").write_text(text)
    again = Rig(tmp_path)
    again.watching.resume()
    assert again.watching.before == ()


def test_a_store_that_cannot_be_written_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from adaptd.app import watching

    rig, calls = Rig(tmp_path), []
    rig.publish()
    real: Callable[..., Any] = watching.take_back

    def flaky(*args: Any) -> Any:
        calls.append(args)
        if len(calls) < 3:
            raise StoreUnavailable("the disk is full")
        return real(*args)

    monkeypatch.setattr(watching, "take_back", flaky)
    monkeypatch.setattr(watching, "_RETRY_S", 0.0)
    asyncio.run(rig.serve(1, 2, 400))
    assert rig.kinds == ["rollback failed", "rollback failed", "rollback"]


def test_a_version_that_the_probes_refuse_is_quarantined_too(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.publish()
    version = rig.publish()
    asyncio.run(rig.watching.refuse(version, "the probe prompts say otherwise"))
    assert rig.store.manifest(rig.store.current() or 0).restored == 1
    assert "the probe prompts" in refusals(rig.store)[version]


def test_a_promotion_that_nobody_told_of_is_watched(tmp_path: Path) -> None:
    """The learner died between publishing and its report."""
    rig = Rig(tmp_path)
    told = rig.watching.promoted
    rig.watching.promoted = lambda version, k: None  # type: ignore[method-assign]
    version = rig.publish()
    rig.watching.promoted = told  # type: ignore[method-assign]
    for _ in range(2):
        rig.watching.catch_up(K)
        assert rig.watching.status()["watching"] == [version]
    asyncio.run(rig.serve(version, 10, 400))
    rig.watching.catch_up(K)
    assert (rig.watching.status()["watching"], rig.watching.settled) == ([], version)


def test_what_the_other_servers_follow_is_what_is_confirmed(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.watching.resume()
    first = rig.publish()
    assert rig.watching.settled == 0
    asyncio.run(rig.serve(first, 10, 400))
    assert rig.watching.settled == first
    asyncio.run(rig.serve(rig.publish(), 2, 400))
    assert rig.watching.settled == rig.store.current() == 3
    again = Rig(tmp_path)
    again.watching.resume()
    assert again.watching.settled == 3
    again.publish()
    last = Rig(tmp_path)
    last.watching.resume()
    assert last.watching.settled == 3


def test_switched_off_nothing_is_watched(tmp_path: Path) -> None:
    rig = Rig(tmp_path, watch=False)
    asyncio.run(rig.serve(rig.publish(), 0, 400))
    assert rig.events == []
    assert not rig.watching.status()["on"]


def test_what_somebody_took_back_by_hand_is_watched_no_more(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    version = rig.publish()
    rig.watching.forget()
    asyncio.run(rig.serve(version, 0, 400))
    assert rig.events == []
