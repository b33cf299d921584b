"""The publisher against a fake server: whatever fails, the server is resumed and an intact draft is at work."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from adaptd.errors import PublishFailed, UpstreamUnavailable
from adaptd.sidecar.client import VllmClient, is_loopback
from adaptd.sidecar.probes import Probe, Prober, compare
from adaptd.sidecar.publisher import Publisher
from adaptd.sidecar.update import Promise, Update
from checkpoints.errors import CorruptCheckpoint
from checkpoints.export import UpdateFile
from tests.unit.sidecar.fake_vllm import ACCEPTED, FakeVllm, error

PROMPTS = [[i, i + 1, i + 2] for i in range(12)]
DOWN = httpx.ConnectError("refused")


class Setting:
    """A publisher, its server, and the versions it can write; 2 is missing, 3 is a dead draft."""

    def __init__(self, folder: Path, *, probes: bool = False, promise: float | None = None) -> None:
        self.server = FakeVllm()
        self.client = VllmClient("http://127.0.0.1:1", transport=httpx.MockTransport(self.server.handler))
        self.promise, self.over = promise, 0
        self.folder = folder
        prober = Prober(self.client, lambda: PROMPTS) if probes else None
        self.publisher = Publisher(self.client, self.write, prober=prober)

    async def write(self, version: int) -> Update:
        if version == 2:
            raise CorruptCheckpoint("sha256", "version 2 is damaged")
        file = UpdateFile(self.folder / f"v{version:06d}.safetensors", "ab" * 32, 14, 1000)
        return Update(version, f"c{version}", file, Promise(self.promise if version else None, self.over))


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    return Setting(tmp_path)


def run(work: Callable[[], Awaitable[Any]]) -> Any:
    async def main() -> Any:
        return await work()

    return asyncio.run(main())


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adaptd.sidecar.publisher._RESUME_WAIT_S", 0.0)


def test_a_publication_is_one_paused_session_and_labels_the_server(setting: Setting) -> None:
    run(lambda: setting.publisher.publish(1))
    server = setting.server
    order = [r for r in server.log if r not in ("/metrics", "/weight_checker", "/weight_info")]
    assert order == [
        "/init_weight_transfer_engine",
        "/pause",
        "/start_draft_weight_update",
        "/update_weights",
        "/finish_weight_update",
        "/resume",
    ]
    assert server.was_paused_at_update == [True]
    assert (server.draft, server.paused, server.label) == (1, False, "adaptd-v1-c1")
    assert setting.publisher.version == 1
    assert not list(setting.folder.iterdir()), "the mark of a paused server is gone"


@pytest.mark.parametrize(
    "route", ["/pause", "/start_draft_weight_update", "/update_weights", "/finish_weight_update", "/weight_checker"]
)
@pytest.mark.parametrize("fault", [error("broken"), httpx.ReadTimeout("slow"), DOWN], ids=["error", "timeout", "down"])
def test_whatever_fails_the_server_is_resumed_with_the_version_before(
    setting: Setting, route: str, fault: httpx.Response | Exception
) -> None:
    async def work() -> None:
        await setting.publisher.publish(1)
        # The baseline of checksums is known by now: the next one is the comparison, inside the pause.
        setting.server.fail(route, fault)
        with pytest.raises((PublishFailed, UpstreamUnavailable)):
            await setting.publisher.publish(4)

    run(work)
    server = setting.server
    assert (server.paused, server.session) == (False, False)
    assert (server.draft, server.label) == (1, "adaptd-v1-c1")
    assert setting.publisher.version == 1
    assert setting.publisher.counts["restored"] == 1


def test_the_first_version_that_fails_leaves_day_0(setting: Setting) -> None:
    setting.server.fail("/update_weights", error("not the file that was announced"))
    with pytest.raises(PublishFailed, match="not the file that was announced") as failed:
        run(lambda: setting.publisher.publish(1))
    assert failed.value.reason == "refused"
    assert (setting.server.draft, setting.server.paused) == (0, False)
    assert setting.publisher.version == 0


def test_a_server_is_resumed_even_if_resuming_fails_at_first(setting: Setting) -> None:
    setting.server.fail("/resume", error("busy"), httpx.ReadTimeout("slow"))
    run(lambda: setting.publisher.publish(1))
    assert not setting.server.paused
    assert setting.server.log.count("/resume") == 3


def test_a_daemon_that_is_stopped_in_the_middle_resumes_the_server(setting: Setting) -> None:
    """Cancelled while the server is paused: leaving it so would be an outage."""

    async def work() -> None:
        async def slow(*_: object) -> None:
            await asyncio.sleep(60)

        setting.client.update = slow  # type: ignore[method-assign]
        task = asyncio.create_task(setting.publisher.publish(1))
        while not setting.server.session:
            await asyncio.sleep(0)
        assert setting.server.paused
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(work)
    assert not setting.server.paused


def test_a_server_that_a_killed_daemon_left_paused_is_resumed_by_the_next(setting: Setting) -> None:
    (setting.folder / "server-paused").touch()
    setting.server.paused = True
    assert run(lambda: setting.publisher.recover(setting.folder)) is True
    assert not setting.server.paused
    assert run(lambda: setting.publisher.recover(setting.folder)) is False


def test_a_pause_of_somebody_else_is_not_ours_to_end(setting: Setting) -> None:
    setting.server.paused = True
    assert run(lambda: setting.publisher.recover(setting.folder)) is False
    assert setting.server.paused


def test_a_session_that_a_dead_publisher_left_open_is_closed_first(setting: Setting) -> None:
    setting.server.session = True
    run(lambda: setting.publisher.publish(1))
    assert (setting.server.draft, setting.server.session) == (1, False)


def test_a_changed_target_stops_all_publishing(setting: Setting) -> None:
    async def work() -> None:
        await setting.publisher.publish(1)
        setting.server.target["tp0:model.embed_tokens.weight"] = "cc"
        with pytest.raises(PublishFailed, match=r"first tp0:model\.embed_tokens\.weight.*restart the server") as failed:
            await setting.publisher.publish(4)
        assert failed.value.reason == "target_changed"
        with pytest.raises(PublishFailed, match="restart the server"):
            await setting.publisher.publish(5)

    run(work)
    assert not setting.server.paused
    assert setting.server.log.count("/update_weights") == 2, "the third publication did not touch the server"


def test_a_damaged_version_never_reaches_the_server(setting: Setting) -> None:
    with pytest.raises(PublishFailed, match="damaged") as failed:
        run(lambda: setting.publisher.publish(2))
    assert failed.value.reason == "checkpoint"
    assert setting.server.log == []


@pytest.mark.parametrize(
    ("route", "answer", "remedy"),
    [
        ("/init_weight_transfer_engine", httpx.Response(404, json={"detail": "Not Found"}), "VLLM_SERVER_DEV_MODE=1"),
        ("/init_weight_transfer_engine", error("Weight transfer not configured."), "--weight-transfer-config"),
        ("/start_draft_weight_update", error("no draft model is configured."), "--speculative-config"),
    ],
)
def test_a_server_that_cannot_be_updated_is_told_apart_with_its_remedy(
    setting: Setting, route: str, answer: httpx.Response, remedy: str
) -> None:
    setting.server.fail(route, answer)
    with pytest.raises(PublishFailed) as failed:
        run(lambda: setting.publisher.publish(1))
    assert failed.value.reason == "unsupported"
    assert remedy in str(failed.value)


def test_a_version_that_keeps_its_promise_stays(tmp_path: Path) -> None:
    setting = Setting(tmp_path, probes=True, promise=0.9)
    run(lambda: setting.publisher.publish(1))
    # One accepted of four a round before, three after: 4 / 2 - 1.
    gain = setting.publisher.last_outcome and setting.publisher.last_outcome.gain
    assert gain is not None
    assert gain.mean == pytest.approx((1 + ACCEPTED[1]) / (1 + ACCEPTED[0]) - 1)
    assert setting.publisher.version == 1


def test_a_version_that_breaks_its_promise_is_taken_back(tmp_path: Path) -> None:
    setting = Setting(tmp_path, probes=True, promise=1.5)
    with pytest.raises(PublishFailed, match=r"does not reach the \+150\.0% promised") as failed:
        run(lambda: setting.publisher.publish(1))
    assert failed.value.reason == "acceptance"
    assert setting.server.draft == 0


def test_a_promise_over_another_version_than_the_one_at_work_says_nothing(tmp_path: Path) -> None:
    setting = Setting(tmp_path, probes=True, promise=1.5)
    setting.over = 4
    run(lambda: setting.publisher.publish(1))
    assert setting.publisher.version == 1


def test_a_dead_draft_is_taken_back_without_any_promise(tmp_path: Path) -> None:
    setting = Setting(tmp_path, probes=True)

    async def work() -> None:
        with pytest.raises(PublishFailed, match="the draft is dead"):
            await setting.publisher.publish(3)
        updates = setting.server.log.count("/update_weights")
        with pytest.raises(PublishFailed, match="not tried again"):
            await setting.publisher.publish(3)
        assert setting.server.log.count("/update_weights") == updates, "a follower that retries costs no traffic"

    run(work)
    assert setting.server.draft == 0


def test_a_server_without_per_request_metrics_is_told_so_before_it_is_touched(tmp_path: Path) -> None:
    setting = Setting(tmp_path, probes=True)
    setting.server.fail("/v1/completions", *[httpx.Response(200, json={"choices": [{}], "metrics": None})] * 12)
    with pytest.raises(PublishFailed, match="--per-request-spec-decode-metrics"):
        run(lambda: setting.publisher.publish(1))
    assert "/pause" not in setting.server.log


def test_few_probes_conclude_nothing() -> None:
    import numpy as np

    probes = [Probe((), 5, 20, 5)] * 7
    assert compare(probes, [Probe((), 5, 20, 0)] * 7, 0.5, np.random.default_rng(0)).kept


@pytest.mark.parametrize("event", ["restart", "sleep", "other"])
def test_what_a_server_lost_is_brought_back_at_the_next_look(setting: Setting, event: str) -> None:
    server, publisher = setting.server, setting.publisher

    async def work() -> None:
        await publisher.publish(1)
        assert await publisher.look() is False
        if event == "restart":
            server.restart()
        elif event == "other":
            server.draft, server.label = 9, "somebody"
        else:
            server.sleeps = True
            assert await publisher.look() is False, "a sleeping server is left alone"
            server.sleeps, server.draft = False, 0
        assert await publisher.look() is True
        assert await publisher.look() is False

    run(work)
    assert (server.draft, server.label, server.paused) == (1, "adaptd-v1-c1", False)
    assert publisher.counts["lost"] == 1


def test_acceptance_that_dies_between_two_looks_brings_the_version_back(setting: Setting) -> None:
    """A sleep of level 2 that no look saw: the label is still on, the weights are gone."""
    server, publisher = setting.server, setting.publisher

    async def work() -> None:
        await publisher.publish(1)
        server.drafted, server.accepted = 400, 200
        assert await publisher.look() is False
        server.drafted = 600
        assert await publisher.look() is False, "too few to tell"
        server.drafted = 700
        assert await publisher.look() is True

    run(work)


def test_an_update_that_ended_unseen_is_undone_when_the_server_answers_again(setting: Setting) -> None:
    """The draft is new, the label is old, and the way back was cut: only the publisher knows."""
    server, publisher = setting.server, setting.publisher

    async def work() -> None:
        await publisher.publish(1)
        server.fail("/finish_weight_update", DOWN)
        original = setting.client.init_transfer
        calls = 0

        async def cut(folder: str) -> None:
            nonlocal calls
            calls += 1
            if calls == 2:
                raise UpstreamUnavailable("cut off")
            await original(folder)

        setting.client.init_transfer = cut  # type: ignore[method-assign]
        with pytest.raises(UpstreamUnavailable):
            await publisher.publish(4)
        assert (server.draft, server.label, publisher.version) == (4, "adaptd-v1-c1", 1)
        assert await publisher.look() is True

    run(work)
    assert (server.draft, server.label, server.paused) == (1, "adaptd-v1-c1", False)


def test_a_daemon_that_starts_anew_goes_back_to_what_the_server_held(setting: Setting) -> None:
    setting.server.draft, setting.server.label = 5, "adaptd-v5-c5"
    setting.server.fail("/update_weights", error("broken"))
    with pytest.raises(PublishFailed):
        run(lambda: setting.publisher.publish(6))
    assert (setting.server.draft, setting.server.label, setting.publisher.version) == (5, "adaptd-v5-c5", 5)


def test_a_server_that_is_no_vllm_is_said_to_be_none(setting: Setting) -> None:
    setting.server.fail("/weight_info", httpx.Response(200, json={"hello": 1}))
    with pytest.raises(PublishFailed, match="is this a vLLM server"):
        run(lambda: setting.publisher.publish(1))


def test_a_server_that_is_away_is_reported_and_gets_its_version_when_it_is_back(setting: Setting) -> None:
    async def work() -> None:
        await setting.publisher.publish(1)
        setting.server.fail("/is_sleeping", DOWN, DOWN)
        with pytest.raises(UpstreamUnavailable):
            await setting.publisher.look()
        watching = asyncio.create_task(setting.publisher.run(0.01))
        setting.server.restart()
        for _ in range(200):
            await asyncio.sleep(0.01)
            if setting.server.draft == 1:
                break
        watching.cancel()

    run(work)
    assert setting.server.draft == 1


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://127.0.0.1:8000", True),
        ("http://[::1]:8000", True),
        ("http://localhost", True),
        ("unix:///run/vllm.sock", True),
        ("http://10.0.0.1:8000", False),
        ("http://vllm.example", False),
        ("http://localhost.example", False),
    ],
)
def test_only_this_machine_is_loopback(url: str, expected: bool) -> None:
    assert is_loopback(url) is expected
