"""Live swaps of the draft of an unmodified vLLM server: faster or not, never other text, never out of service."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from adaptd.app.doctor_vllm import vllm_checks
from adaptd.config import Config
from adaptd.errors import PublishFailed
from adaptd.models.chat import render_chat
from adaptd.models.scope import ScopeConfig
from adaptd.sidecar.checks import Expected, run_checks
from adaptd.sidecar.client import UpstreamRefused, VllmClient
from adaptd.sidecar.metrics import SpecCounters
from adaptd.sidecar.probes import Prober
from adaptd.sidecar.publisher import Publisher
from adaptd.sidecar.update import Promise, Update
from checkpoints.export import UpdateFile
from tests.integration.vllm.helpers import Draft, K, complete, steps_of, tokens
from tests.integration.vllm.server import VllmServer

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

Run = Callable[[Callable[[], Awaitable[Any]]], Any]


class Setting:
    """A publisher to the server; `alter` changes an update on its way."""

    def __init__(self, server: VllmServer, draft: Draft, *, probes: bool = False) -> None:
        self.client = VllmClient(server.url)
        self.server, self.draft = server, draft
        self.prompts = [t.tokens[: t.prompt_len].tolist() for t in draft.held_out]
        self.alter: Callable[[Update], Update] = lambda update: update
        prober = Prober(self.client, lambda: self.prompts[:16]) if probes else None
        self.publisher = Publisher(self.client, self.write, prober=prober)

    async def write(self, version: int) -> Update:
        update = await asyncio.to_thread(self.draft.writer.write, version)
        return self.alter(update)

    async def decode(self) -> tuple[list[dict[str, Any]], SpecCounters]:
        """Greedy answers to the held-out prompts, and what vLLM's own counters say of them."""
        before = (await self.client.metrics()).counters
        answers = await complete(self.server.url, self.prompts)
        return answers, (await self.client.metrics()).counters - before


def accepted_steps(answer: dict[str, Any]) -> list[int]:
    return list(answer["metrics"]["speculative_decoding"]["per_step_accepted"])


def test_a_version_changes_acceptance_as_evaluated_and_not_one_token(
    server: VllmServer, draft: Draft, run: Run
) -> None:
    setting = Setting(server, draft)

    async def work() -> None:
        text: list[list[int]] = []
        mal = {}
        for version in (0, 1, 2, 1, 0):
            await setting.publisher.publish(version)
            answers, window = await setting.decode()
            text = text or tokens(answers)
            assert tokens(answers) == text, f"version {version} changed the target's text"
            expected = [steps_of(accepts) for accepts in draft.accepts(version)]
            # Whole steps only: the last one may be cut by the length limit.
            exact = [accepted_steps(a)[: len(e)] == e for a, e in zip(answers, expected, strict=True)]
            assert sum(exact) >= 0.9 * len(exact), f"version {version}: {exact}"
            mal.setdefault(version, []).append(window.mal)
            assert await setting.client.weight_version() == setting.publisher.status()["label"]
        print("MAL by vLLM's counters:", mal)
        assert mal[1][0] > 1.05 * mal[0][0], mal
        assert mal[2][0] < mal[0][0], mal
        assert mal[0][1] == pytest.approx(mal[0][0], rel=0.02), "day 0 undoes every version"
        assert mal[1][1] == pytest.approx(mal[1][0], rel=0.02)

    run(work)


def test_the_targets_weights_are_the_same_before_and_after(server: VllmServer, draft: Draft, run: Run) -> None:
    setting = Setting(server, draft)

    async def work() -> None:
        before = await setting.client.target_checksums()
        await setting.publisher.publish(1)
        assert await setting.client.target_checksums() == before
        assert any("embed_tokens" in name for name in before)

    run(work)


@pytest.mark.parametrize("damage", ["truncated", "half a module", "another shape", "not finite", "an embedding"])
def test_a_bad_file_is_refused_and_the_draft_stays_at_work(
    server: VllmServer, draft: Draft, run: Run, damage: str
) -> None:
    setting = Setting(server, draft)
    q = "model.layers.0.self_attn.q_proj.weight"

    def harm(update: Update) -> Update:
        if update.version != 2:
            return update
        path = update.file.path
        if damage == "truncated":
            path.write_bytes(path.read_bytes()[:-64])
            return update
        tensors = load_file(path)
        if damage == "half a module":
            del tensors[q]
        elif damage == "another shape":
            tensors[q] = tensors[q][:, :-1].contiguous()
        elif damage == "not finite":
            tensors[q][0, 0] = torch.nan
        else:
            tensors["model.embed_tokens.weight"] = torch.zeros(4096, 192)
        save_file(tensors, path)
        return update._replace(file=_described(update.file))

    async def work() -> None:
        await setting.publisher.publish(1)
        before, _ = await setting.decode()
        setting.alter = harm
        with pytest.raises(PublishFailed) as failed:
            await setting.publisher.publish(2)
        assert failed.value.reason == "refused"
        after, _ = await setting.decode()
        assert [accepted_steps(a) for a in after] == [accepted_steps(a) for a in before]
        assert tokens(after) == tokens(before)
        assert not await setting.client.paused()

    run(work)


def test_a_refused_file_has_changed_nothing_even_before_anything_is_restored(
    server: VllmServer, draft: Draft, run: Run
) -> None:
    """The bare routes, without the publisher: the old draft is at work although no update followed."""
    setting = Setting(server, draft)

    async def work() -> None:
        await setting.publisher.publish(1)
        before, _ = await setting.decode()
        update = await setting.write(2)
        await setting.client.start_draft_update()
        with pytest.raises(UpstreamRefused, match="not the file that was announced"):
            await setting.client.update(str(update.file.path), "0" * 64)
        during, _ = await setting.decode()
        assert [accepted_steps(a) for a in during] == [accepted_steps(a) for a in before]
        await setting.client.start_draft_update()
        open_session, _ = await setting.decode()
        assert [accepted_steps(a) for a in open_session] == [accepted_steps(a) for a in before]
        await setting.publisher.publish(1)

    run(work)


def test_an_update_that_breaks_off_in_the_middle_is_undone(server: VllmServer, draft: Draft, run: Run) -> None:
    """Nine of fourteen tensors arrived: one layer is new, one module half. The first restoration fails as well."""
    setting = Setting(server, draft)

    def mend(update: Update) -> Update:
        if update.version == 0:
            server.fault.unlink()
        return update

    async def work() -> None:
        await setting.publisher.publish(1)
        before, _ = await setting.decode()
        setting.alter = mend
        server.fault.touch()
        with pytest.raises(PublishFailed, match="planted fault"):
            await setting.publisher.publish(2)
        # Version 1 broke off too, day 0 went through.
        assert setting.publisher.version == 0
        assert not await setting.client.paused()
        await setting.publisher.publish(1)
        after, _ = await setting.decode()
        assert [accepted_steps(a) for a in after] == [accepted_steps(a) for a in before]
        assert tokens(after) == tokens(before)

    run(work)


def test_modules_that_an_update_did_not_reach_keep_their_values(server: VllmServer, draft: Draft, run: Run) -> None:
    """The same tensors broken off in the middle: what was loaded is equal, what was not must be as it was."""
    setting = Setting(server, draft)

    async def work() -> None:
        await setting.publisher.publish(1)
        before, _ = await setting.decode()
        update = await setting.write(1)
        server.fault.touch()
        try:
            await setting.client.start_draft_update()
            with pytest.raises(UpstreamRefused, match="planted fault"):
                await setting.client.update(str(update.file.path), update.file.sha256)
        finally:
            server.fault.unlink()
        after, _ = await setting.decode()
        assert [accepted_steps(a) for a in after] == [accepted_steps(a) for a in before]

    run(work)


def test_a_version_that_breaks_its_promise_goes_and_the_one_before_comes_back(
    server: VllmServer, draft: Draft, run: Run
) -> None:
    setting = Setting(server, draft, probes=True)

    def promise(update: Update) -> Update:
        return update._replace(promise=Promise(0.01, over=1) if update.version == 2 else Promise())

    async def work() -> None:
        setting.alter = promise
        await setting.publisher.publish(1)
        before, _ = await setting.decode()
        with pytest.raises(PublishFailed, match=r"does not reach|dead") as failed:
            await setting.publisher.publish(2)
        assert failed.value.reason == "acceptance"
        assert setting.publisher.version == 1
        after, _ = await setting.decode()
        assert [accepted_steps(a) for a in after] == [accepted_steps(a) for a in before]
        assert not await setting.client.paused()

    run(work)


def test_the_target_itself_cannot_be_updated(server: VllmServer, draft: Draft, run: Run) -> None:
    async def work() -> None:
        async with httpx.AsyncClient(base_url=server.url) as http:
            answer = await http.post("/start_weight_update")
        assert answer.status_code == 500
        assert "drafts only" in json.dumps(answer.json())

    run(work)


def test_swaps_under_load_change_no_text(server: VllmServer, draft: Draft, run: Run) -> None:
    """Concurrency 16, temperature 0, a dozen swaps, each soon after the one before."""
    setting = Setting(server, draft)
    load = setting.prompts * 4

    async def work() -> None:
        await setting.publisher.publish(0)
        expected = tokens(await complete(server.url, load, concurrency=16))
        swapping = asyncio.create_task(complete(server.url, load, concurrency=16))
        version, swaps = 1, 0
        while not swapping.done() and swaps < 12:
            await asyncio.sleep(0.1)
            await setting.publisher.publish(version)
            version, swaps = (2 if version == 1 else 1), swaps + 1
        assert tokens(await swapping) == expected
        print(f"{swaps} swaps under load, longest pause {setting.publisher.counts['max_pause_s']:.3f} s")
        assert swaps >= 3

    run(work)


def test_many_swaps_leave_the_servers_memory_where_it_was(server: VllmServer, draft: Draft, run: Run) -> None:
    """A daemon that publishes every few minutes would otherwise fill the machine within days."""
    setting = Setting(server, draft)

    async def work() -> None:
        updates = {}
        for version in (1, 2):
            updates[version] = await setting.write(version)

        async def swap(times: int) -> int:
            for n in range(times):
                await setting.publisher.publish(1 + n % 2)
            return server.resident_bytes()

        async def written(version: int) -> Update:
            return updates[version]

        setting.publisher = Publisher(setting.client, written)
        first = await swap(10)
        second = await swap(30)
        size = updates[1].file.bytes
        print(f"40 swaps of {size / 2**20:.1f} MiB: {(second - first) / 2**20:+.1f} MiB over the last 30")
        assert second - first < 10 * size, "a third of what a copy kept at every swap would be"

    run(work)


def test_a_server_that_restarts_gets_its_version_back(server: VllmServer, draft: Draft, run: Run) -> None:
    setting = Setting(server, draft)

    async def work() -> None:
        await setting.publisher.publish(1)
        before, _ = await setting.decode()
        assert await setting.publisher.look() is False
        server.stop()
        server.start()
        day_0, _ = await setting.decode()
        assert await setting.publisher.look() is True
        after, _ = await setting.decode()
        assert [accepted_steps(a) for a in after] == [accepted_steps(a) for a in before]
        assert [accepted_steps(a) for a in day_0] != [accepted_steps(a) for a in before]

    run(work)


def test_doctor_finds_nothing_wrong_with_a_server_started_as_documented(
    server: VllmServer, swap_settings: Config
) -> None:
    upstream = swap_settings.upstream.model_copy(update={"url": server.url, "top_logprobs": 32, "publish": True})
    found = list(vllm_checks(swap_settings.model_copy(update={"upstream": upstream})))
    assert [f for f in found if f.state != "ok"] == []
    names = {f.name for f in found}
    assert names >= {
        "publishing",
        "vocabulary",
        "chat template",
        "plugin",
        "tied head",
        "per-request metrics",
        "prefix cache",
    }


def test_doctor_sees_what_does_not_fit_the_server(server: VllmServer, pocket_tokenizer: Any) -> None:
    expected = Expected(
        k=K + 1,
        top_logprobs=33,
        draft_sampling="probabilistic",
        scope=ScopeConfig().to_dict(),
        tokenize=lambda text: [*pocket_tokenizer.encode(text), 0],
        render=lambda messages: [0, *render_chat(pocket_tokenizer, messages)],
    )
    found = {f.name: f for f in run_checks(server.url, expected)}
    wrong = {name for name, f in found.items() if f.state != "ok"}
    assert wrong == {"vocabulary", "chat template", "depth", "draft sampling", "draft folder", "--max-logprobs"}
    assert all(found[name].remedy for name in wrong)


def _described(file: UpdateFile) -> UpdateFile:
    import hashlib

    return UpdateFile(file.path, hashlib.sha256(file.path.read_bytes()).hexdigest(), file.tensors, file.bytes)


def test_the_pattern_of_steps_is_read_off_the_positions() -> None:
    import numpy as np

    row = np.array([0, 1, 1, 0, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1], dtype=float)
    assert K == 4
    # From 1: two accepted, the correction at 3; from 4: all four, the bonus at 8; from 9: none.
    assert steps_of(row) == [2, 4, 0]
