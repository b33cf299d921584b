"""Probing a fake server, publishing through a fake publisher, building traces on the thread."""

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from adaptd.errors import ConfigError
from adaptd.sections import UpstreamConfig
from adaptd.sidecar.answer import ChoiceSeen, Seen
from adaptd.sidecar.capture import Captured, CaptureThread
from adaptd.sidecar.probe import Capabilities, probe
from adaptd.sidecar.publish import PublishFollower
from adaptd.sidecar.traces import Provenance
from adaptd.sidecar.upstream import Upstream
from buffers.trace import Trace
from checkpoints.store import CheckpointStore


class FakeVllm:
    """Answers as vLLM 0.32 does, as far as the probe looks."""

    def __init__(self, max_logprobs: int = 20, mode: str = "raw", *, forced: bool = False, odd: bool = False) -> None:
        self.max_logprobs, self.mode, self.forced, self.odd = max_logprobs, mode, forced, odd

    def handle(self, request: httpx.Request) -> httpx.Response:
        path = request.url.path
        if path == "/v1/models":
            listed = [{"id": "m", "root": "r", "parent": None}, {"id": "adapter", "parent": "m"}]
            return httpx.Response(200, json={"data": listed})
        if path == "/version":
            return httpx.Response(200, json={"version": "0.32.0"})
        asked = json.loads(request.content)
        chat = "chat" in path
        wanted = asked.get("top_logprobs" if chat else "logprobs") or 0
        if wanted > self.max_logprobs:
            return httpx.Response(400, json={"error": {}})
        choice = self._choice(asked, chat, wanted)
        ids = [1] if asked.get("return_token_ids") else None
        if not asked.get("stream"):
            metrics = {
                "num_spec_steps": 1,
                "num_draft_tokens": 4,
                "num_accepted_draft_tokens": 1,
                "num_spec_tokens": 4,
                "per_step_accepted": [1],
                "per_step_drafted": [4],
            }
            return httpx.Response(
                200,
                json={
                    "id": "c",
                    "choices": [choice],
                    "usage": {"completion_tokens": 1},
                    "prompt_token_ids": ids if chat else None,
                    "metrics": {"speculative_decoding": metrics},
                },
            )
        usage = (asked.get("stream_options") or {}).get("include_usage") or self.forced
        events: list[dict[str, Any]] = [{"id": "c", "choices": [choice]}]
        if not usage:
            events[0]["system_fingerprint"] = "f"
        else:
            events.append({"id": "c", "choices": [], "usage": {"completion_tokens": 1}, "system_fingerprint": "f"})
        text = "".join(f"data: {json.dumps(e, separators=(',', ':'))}\n\n" for e in events) + "data: [DONE]\n\n"
        return httpx.Response(200, text=text, headers={"content-type": "text/event-stream"})

    def _choice(self, asked: dict[str, Any], chat: bool, wanted: int) -> dict[str, Any]:
        scale = 1 / asked["temperature"] if self.mode == "processed" and asked["temperature"] else 1.0
        values = [(-0.6 - i) * scale + (9 if self.mode == "logits" else 0) for i in range(wanted)]
        names = [f"token_id:{i}" if asked.get("return_tokens_as_token_ids") else f"t{i}" for i in range(wanted)]
        logprobs: Any = None
        if wanted and chat:
            top = [{"token": n, "logprob": v} for n, v in zip(names, values, strict=True)]
            logprobs = {"content": [{**top[0], "top_logprobs": top}]}
        elif wanted:
            logprobs = {
                "tokens": names[:1],
                "token_logprobs": values[:1],
                "top_logprobs": [dict(zip(names, values, strict=True))],
            }
        content = {"message": {"content": "a"}, "delta": {"content": "a"}} if chat else {"text": "a"}
        choice = {"index": 0, **content, "logprobs": logprobs, "finish_reason": "length"}
        if asked.get("return_token_ids") or not self.odd:
            choice["token_ids"] = [0] if asked.get("return_token_ids") else None
        return choice


def probed(server: FakeVllm, wanted: int = 8) -> Capabilities:
    async def run() -> Capabilities:
        client = httpx.AsyncClient(base_url="http://s", transport=httpx.MockTransport(server.handle))
        return await probe(client, {}, wanted)

    return asyncio.run(run())


def test_a_server_as_it_should_be() -> None:
    able = probed(FakeVllm())
    assert able.reason == ""
    assert (able.k, able.top_logprobs, able.per_step, able.version) == (4, 8, True, "0.32.0")
    assert able.models == ("m",), "an adapter is another target"


def test_the_depth_is_what_the_server_allows() -> None:
    assert probed(FakeVllm(max_logprobs=5)).top_logprobs == 5
    able = probed(FakeVllm(max_logprobs=0))
    assert able.top_logprobs == 0
    assert "--max-logprobs" in able.reason


@pytest.mark.parametrize("mode", ["processed", "logits"])
def test_other_logprobs_than_raw_ones_are_refused_with_the_remedy(mode: str) -> None:
    able = probed(FakeVllm(mode=mode))
    assert able.top_logprobs == 0
    assert "--logprobs-mode raw_logprobs" in able.reason


def test_usage_that_is_forced_is_noticed() -> None:
    able = probed(FakeVllm(forced=True))
    assert able.usage_forced
    assert able.reason == ""


def test_a_server_whose_answers_cannot_be_put_back_is_never_added_to() -> None:
    able = probed(FakeVllm(odd=True))
    assert able.top_logprobs == 0
    assert "cannot be put back" in able.reason


@pytest.mark.parametrize("status", [401, 500])
def test_a_server_that_is_up_and_refuses_the_probe_is_up_and_never_added_to(
    monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    def handle(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200 if request.url.path == "/health" else status)

    def client(*_: Any, **__: Any) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url="http://s", transport=httpx.MockTransport(handle))

    monkeypatch.setattr("adaptd.sidecar.upstream.make_client", client)
    upstream = Upstream(UpstreamConfig())
    assert asyncio.run(upstream.poll())
    assert upstream.up
    assert upstream.capabilities.models == ()
    assert "upstream.api_key" in upstream.capabilities.reason


def test_a_server_that_comes_back_is_probed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    server, up, asked = FakeVllm(), [False], [0]

    def handle(request: httpx.Request) -> httpx.Response:
        if not up[0]:
            raise httpx.ConnectError("no")
        if request.url.path == "/health":
            return httpx.Response(200)
        asked[0] += request.url.path == "/v1/models"
        return server.handle(request)

    def client(*_: Any, **__: Any) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url="http://s", transport=httpx.MockTransport(handle))

    monkeypatch.setattr("adaptd.sidecar.upstream.make_client", client)
    upstream = Upstream(UpstreamConfig())

    async def run() -> None:
        for state, depth in ((False, 0), (True, 8), (True, 8), (False, 0), (True, 8)):
            up[0] = state
            assert await upstream.poll() is state
            assert upstream.capabilities.top_logprobs == depth

    asyncio.run(run())
    assert asked[0] == 2


class Publisher:
    def __init__(self) -> None:
        self.calls: list[int] = []
        self.broken = False
        self.version: int | None = None

    async def publish(self, version: int) -> None:
        self.calls.append(version)
        if self.broken:
            raise RuntimeError("refused")
        self.version = version


class Store:
    version: int | None = None

    def current(self) -> int | None:
        return self.version


def test_a_new_version_is_published_once_and_a_failed_one_again_later() -> None:
    now = [0.0]
    store, publisher = Store(), Publisher()
    told: list[int] = []
    follower = PublishFollower(
        store,  # type: ignore[arg-type]
        publisher,
        retry_s=30,
        clock=lambda: now[0],
        failed=lambda version, error: told.append(version),
    )
    assert not asyncio.run(follower.poll())
    store.version = 1
    assert asyncio.run(follower.poll())
    assert not asyncio.run(follower.poll())
    assert follower.version == 1
    store.version, publisher.broken = 2, True
    for _ in range(3):
        assert not asyncio.run(follower.poll())
    assert (follower.version, follower.counts["refusals"], told) == (1, 1, [2])
    now[0], publisher.broken = 31.0, False
    assert asyncio.run(follower.poll())
    assert publisher.calls == [1, 2, 2]
    assert (follower.version, follower.counts["swaps"]) == (2, 2)


def test_without_a_publisher_versions_stay_in_the_store(tmp_path: Path) -> None:
    follower = PublishFollower(CheckpointStore(tmp_path), None)
    assert not asyncio.run(follower.poll())
    assert follower.version == 0


def test_what_another_store_left_in_the_server_is_published_over_even_by_day_0() -> None:
    store, publisher = Store(), Publisher()
    follower = PublishFollower(store, publisher)  # type: ignore[arg-type]
    follower.foreign = True
    assert asyncio.run(follower.poll())
    assert publisher.calls == [0]
    assert not asyncio.run(follower.poll())


def test_a_publisher_that_fell_back_further_gets_the_version_again() -> None:
    """What the publisher says is at work counts, not what it was last asked for."""
    store, publisher = Store(), Publisher()
    follower = PublishFollower(store, publisher)  # type: ignore[arg-type]
    store.version = 1
    assert asyncio.run(follower.poll())
    publisher.version = 0
    assert follower.version == 0
    assert asyncio.run(follower.poll())
    assert publisher.calls == [1, 1]


ABOUT = Provenance(
    target_id="t",
    draft_version=0,
    domain="d",
    tenant="",
    temperature=1.0,
    top_p=1.0,
    top_k=0,
    max_tokens=10,
    reserved_share=0.0,
)


def test_the_capture_thread_survives_whatever_it_is_given() -> None:
    kept: list[Trace] = []

    def append(trace: Trace, priority: float) -> bool:
        assert priority == 1.0
        kept.append(trace)
        return True

    thread = CaptureThread(append, max_pending=4)
    piece = {
        "content": [
            {"token": "token_id:5", "logprob": -0.1, "top_logprobs": [{"token": "token_id:5", "logprob": -0.1}]}
        ]
    }
    good = Seen({0: ChoiceSeen([5], [piece], [1], "stop")}, answer_id="c")
    for seen in (good, Seen(), Seen({0: ChoiceSeen([5], [], [1])}), "no answer", good):
        thread.put(Captured(seen, None, ABOUT))  # type: ignore[arg-type]
        thread.flush()
    assert (thread.built, len(kept)) == (2, 2)
    assert sum(thread.refused.values()) == 2
    thread.close()


def test_a_full_queue_drops_and_counts() -> None:
    import threading

    gate = threading.Event()
    thread = CaptureThread(lambda *_: gate.wait(), max_pending=1)
    piece = {
        "content": [
            {"token": "token_id:5", "logprob": -0.1, "top_logprobs": [{"token": "token_id:5", "logprob": -0.1}]}
        ]
    }
    item = Captured(Seen({0: ChoiceSeen([5], [piece], [1], "stop")}, answer_id="c"), None, ABOUT)
    results = [thread.put(item) for _ in range(4)]
    assert not results[-1]
    assert thread.dropped >= 2
    gate.set()
    thread.close()


def test_capture_of_rejections_alone_is_refused_for_this_engine() -> None:
    from adaptd.app.sidecar import SidecarDaemon
    from adaptd.config import load

    with pytest.raises(ConfigError, match=r"capture\.positions"):
        SidecarDaemon(load(None, ["engine.kind=vllm", "capture.positions=rejected"]))
