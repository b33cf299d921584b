"""The publisher's place in the daemon: when it is at work, what becomes of a version that fails, how it ends."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from adaptd.app.publication import Publication, why_not
from adaptd.config import Config, load
from adaptd.errors import ConfigError
from adaptd.sidecar.client import VllmClient
from adaptd.sidecar.probes import Prober
from adaptd.sidecar.publisher import Publisher
from adaptd.sidecar.update import Promise, Update
from adaptd.sidecar.upstream import Upstream
from checkpoints.export import UpdateFile
from tests.unit.sidecar.fake_vllm import FakeVllm

FOLDABLE = ["engine.kind=vllm", "adapt.gated=false", "adapt.head_rank=0", "adapt.embed_rank=0"]
PROMPTS = [[i, i + 1] for i in range(12)]


def settings(home: Path, *more: str) -> Config:
    return load(None, [*FOLDABLE, f"state_dir={home}", *more])


class Store:
    version: int | None = None

    def current(self) -> int | None:
        return self.version


class Setting:
    """A publication against the fake server, with version 1 better than day 0 and version 2 worse."""

    def __init__(self, home: Path, *more: str, promise: float | None = None) -> None:
        self.config = settings(home, *more)
        self.server, self.store = FakeVllm(), Store()
        self.server.config = {
            "speculative_config": {"method": "draft_model", "num_speculative_tokens": 4, "model": "elsewhere"},
            "weight_transfer_config": {"backend": "adaptd_disk"},
        }
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.reasons: list[str] = []
        self.promise = promise
        self.upstream = Upstream(self.config.upstream)
        self.upstream.up = True
        self.publication = Publication(
            self.config,
            self.store,  # type: ignore[arg-type]
            self.upstream,
            prompts=lambda: PROMPTS,
            remember=lambda kind, **fields: self.events.append((kind, fields)),
            rollback=self.rollback,
        )
        client = VllmClient("http://127.0.0.1:1", transport=httpx.MockTransport(self.server.handler))
        publisher = Publisher(client, self.write, prober=Prober(client, lambda: PROMPTS))
        self.updates = self.config.home / "updates"
        self.updates.mkdir(parents=True)
        self.publication._client = client
        self.publication.publisher = self.publication.follower._publisher = publisher

    async def write(self, version: int) -> Update:
        file = UpdateFile(self.updates / f"v{version:06d}.safetensors", "ab" * 32, 14, 1000)
        return Update(version, f"c{version}", file, Promise(self.promise if version else None, 0))

    async def rollback(self, version: int, reason: str) -> None:
        self.reasons.append(reason)
        self.store.version = 1

    def kinds(self) -> list[str]:
        return [kind for kind, _ in self.events]


def run(work: Callable[[], Awaitable[Any]]) -> Any:
    async def main() -> Any:
        return await work()

    return asyncio.run(main())


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adaptd.sidecar.publisher._RESUME_WAIT_S", 0.0)


def test_by_itself_it_publishes_what_can_be_folded_to_a_server_that_nobody_else_reaches(tmp_path: Path) -> None:
    assert why_not(settings(tmp_path)) == ""
    assert "adapt.gated: false" in why_not(load(None, ["engine.kind=vllm"]))
    assert "upstream.publish_remote: true" in why_not(settings(tmp_path, "upstream.url=http://10.0.0.7:8000"))
    assert why_not(settings(tmp_path, "upstream.url=http://10.0.0.7:8000", "upstream.publish_remote=true")) == ""
    assert why_not(settings(tmp_path, "upstream.publish=false")) == "upstream.publish is false"


@pytest.mark.parametrize(
    ("sets", "key"),
    [
        (["adapt.gated=true"], r"adapt\.gated: false"),
        (["adapt.request_gate=true"], r"adapt\.request_gate: false"),
        (["adapt.head_rank=24"], r"adapt\.head_rank: 0"),
        (["adapt.embed_rank=24"], r"adapt\.embed_rank: 0"),
        (["upstream.url=http://10.0.0.7:8000"], r"upstream\.publish_remote: true"),
    ],
)
def test_asked_to_publish_what_it_cannot_it_names_keys_and_remedy(tmp_path: Path, sets: list[str], key: str) -> None:
    with pytest.raises(ConfigError, match=rf"upstream\.publish is true.*{key}.*upstream\.publish: false"):
        why_not(settings(tmp_path, "upstream.publish=true", *sets))


def test_the_shipped_configuration_for_vllm_publishes() -> None:
    assert why_not(load(Path(__file__).parents[3] / "configs" / "vllm.yaml")) == ""


def test_a_new_version_gets_in_and_is_an_event(tmp_path: Path) -> None:
    setting = Setting(tmp_path)

    async def work() -> None:
        await setting.publication.poll()
        assert setting.publication.active
        assert setting.server.label == "default", "day 0 is what the server has"
        setting.store.version = 1
        await setting.publication.poll()

    run(work)
    assert (setting.server.draft, setting.publication.version) == (1, 1)
    assert setting.events == [("published", {"version": 1, "probe": setting.events[0][1]["probe"]})]
    status = setting.publication.status()
    assert (status["active"], status["published"], status["version"], status["swaps"]) == (True, 1, 1, 1)
    assert status["target_tensors_checked"] == "2 of 2"


def test_a_server_that_cannot_take_drafts_is_said_and_asked_again_when_it_comes_back(tmp_path: Path) -> None:
    setting = Setting(tmp_path)
    backend = setting.server.config.pop("weight_transfer_config")
    setting.store.version = 1

    async def work() -> None:
        await setting.publication.poll()
        assert "adaptd_disk" in setting.publication.status()["reason"]
        assert not setting.publication.active
        asked = len(setting.server.log)
        await setting.publication.poll()
        assert len(setting.server.log) == asked, "not asked at every poll"
        setting.server.config["weight_transfer_config"] = backend
        setting.upstream.since += 1.0
        await setting.publication.poll()

    run(work)
    assert (setting.server.draft, setting.publication.active) == (1, True)


def test_a_server_without_development_routes_gets_nothing(tmp_path: Path) -> None:
    setting = Setting(tmp_path)
    setting.server.fail("/weight_info", httpx.Response(404, json={"detail": "Not Found"}))
    setting.store.version = 1
    run(setting.publication.poll)
    assert "VLLM_SERVER_DEV_MODE=1" in setting.publication.status()["reason"]
    assert "/update_weights" not in setting.server.log


def test_asked_to_publish_it_tries_and_the_servers_refusal_is_an_event(tmp_path: Path) -> None:
    setting = Setting(tmp_path, "upstream.publish=true")
    setting.server.fail("/init_weight_transfer_engine", httpx.Response(404, json={"detail": "Not Found"}))
    setting.store.version = 1

    async def work() -> None:
        await setting.publication.poll()
        await setting.publication.poll()

    run(work)
    assert setting.kinds() == ["publication failed", "restored"]
    assert setting.events[0][1]["reason"] == "unsupported"
    assert setting.publication.status()["refusals"] == 1


def test_a_server_that_comes_back_without_its_version_gets_it_at_once(tmp_path: Path) -> None:
    setting = Setting(tmp_path)
    setting.store.version = 1

    async def work() -> None:
        await setting.publication.poll()
        setting.server.restart()
        setting.upstream.since += 1.0
        await setting.publication.poll()

    run(work)
    assert setting.server.draft == 1
    assert setting.kinds() == ["published", "restored"]


def test_a_version_that_breaks_its_promise_takes_the_store_back(tmp_path: Path) -> None:
    setting = Setting(tmp_path, promise=0.5)

    async def work() -> None:
        setting.store.version = 2  # the fake server accepts nothing of it
        await setting.publication.poll()
        await asyncio.sleep(0)
        assert setting.store.version == 1
        await setting.publication.poll()

    run(work)
    assert len(setting.reasons) == 1
    assert "dead" in setting.reasons[0]
    assert setting.kinds()[0] == "publication failed"
    assert setting.events[0][1]["reason"] == "acceptance"


def test_a_version_that_was_replaced_meanwhile_is_not_rolled_back(tmp_path: Path) -> None:
    setting = Setting(tmp_path)

    async def work() -> None:
        setting.store.version = 4
        await setting.publication._give_back(2, "dead")

    run(work)
    assert setting.reasons == []


def test_a_rollback_that_fails_is_an_event(tmp_path: Path) -> None:
    setting = Setting(tmp_path)

    async def broken(reason: str) -> None:
        raise RuntimeError("the learner is restarting")

    setting.publication._rollback = broken
    setting.store.version = 2
    run(lambda: setting.publication._give_back(2, "dead"))
    assert setting.kinds() == ["rollback failed"]


def test_a_server_that_was_left_paused_is_resumed_before_anything_else(tmp_path: Path) -> None:
    setting = Setting(tmp_path)
    (setting.updates / "server-paused").touch()
    setting.server.paused = True
    assert run(setting.publication.recover) is True
    assert not setting.server.paused
    assert setting.kinds() == ["server resumed"]
    assert setting.server.log == ["/resume"]


def test_it_outlives_what_nobody_thought_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adaptd.app.publication._ASK_AGAIN_S", 0.0)
    setting = Setting(tmp_path, "checkpoints.poll_s=0.01")
    (setting.updates / ".tmp-v000009.safetensors").touch()
    setting.server.fail("/weight_info", httpx.Response(200, text="[]"), httpx.Response(200, text="1"))
    setting.store.version = 1

    async def work() -> None:
        setting.publication.start()
        for _ in range(200):
            if setting.publication.version == 1:
                break
            await asyncio.sleep(0.01)
        await setting.publication.close()

    run(work)
    assert setting.server.draft == 1
    assert not list(setting.updates.iterdir()), "what an earlier writer left unfinished is gone"


def test_ending_in_the_middle_of_a_publication_leaves_the_server_resumed(tmp_path: Path) -> None:
    setting = Setting(tmp_path, "checkpoints.poll_s=0.01")
    setting.store.version = 1
    reached = asyncio.Event()

    async def hang(path: str, sha256: str) -> None:
        reached.set()
        await asyncio.sleep(60)

    async def work() -> None:
        publisher = setting.publication.publisher
        assert publisher is not None
        publisher._client.update = hang  # type: ignore[method-assign]
        settle = publisher.settle
        publisher.settle = lambda seconds=0.0: settle(0.01)  # type: ignore[method-assign]
        setting.publication.start()
        await reached.wait()
        assert setting.server.paused
        await setting.publication.close()
        assert not setting.server.paused

    run(work)
