"""A server that comes up after the daemon, or comes back as another: gate, monitor and learner follow it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from adaptd.app.sidecar import SidecarDaemon
from adaptd.config import Config, load
from adaptd.sidecar.probe import Capabilities


class Learner:
    def __init__(self, k: int) -> None:
        self.k = k
        self.targets: list[str] = []
        self.follow_target = SimpleNamespace(remote=self.targets.append)


class Cluster:
    def __init__(self) -> None:
        self.ended: list[Any] = []

    def learner_again(self, learner: Learner, config: Config, buffer_url: str) -> Learner:
        self.ended.append(learner)
        return Learner(config.engine.k)


@pytest.fixture
def daemon(tmp_path: Path) -> SidecarDaemon:
    made = SidecarDaemon(load(None, ["engine.kind=vllm", f"state_dir={tmp_path}", "engine.k=4"]))
    made.upstream.servers[0].upstream.up = True
    made.learner, made._cluster = Learner(4), Cluster()  # type: ignore[assignment]
    return made


def test_a_server_that_nobody_has_seen_changes_nothing(daemon: SidecarDaemon) -> None:
    daemon._follow_server()
    assert (daemon.config.engine.k, daemon.learner.targets) == (4, [])


def test_the_depth_is_adopted_and_the_learner_starts_again_with_it(daemon: SidecarDaemon) -> None:
    old = daemon.learner
    daemon.upstream.servers[0].upstream.capabilities = Capabilities(models=("m",), k=2, target_id="t")
    for _ in range(2):
        daemon._follow_server()
    assert (daemon.config.engine.k, daemon.learner.k, daemon.learner.targets) == (2, 2, ["t"])
    assert daemon._cluster.ended == [old]  # type: ignore[attr-defined]
    assert len(daemon.monitor.now()["by_depth"]) == 2


def test_another_target_reaches_the_learner_once(daemon: SidecarDaemon) -> None:
    for name in ("a", "a", "", "a", "b"):
        daemon.upstream.servers[0].upstream.capabilities = Capabilities(models=("m",), k=4, target_id=name)
        daemon._follow_server()
    assert daemon.learner.targets == ["a", "b"]
