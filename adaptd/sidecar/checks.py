"""`adaptd doctor` for a vLLM server: every trap of that engine that can be seen from outside, each with its remedy.

Reads only: nothing is paused, loaded or written. The traps are silent ones (outputs stay right, speed is lost), or
leave the server open; docs/sidecar.md lists them.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from adaptd.errors import AdaptdError, ConfigError, UpstreamUnavailable
from adaptd.sidecar.client import UpstreamRefused, VllmClient, is_loopback
from adaptd.sidecar.kinds import draft_kind
from adaptd.sidecar.vllm_plugin import BACKEND

#: File that `adaptd export` writes beside a draft (`adaptd.models.fold.PROVENANCE`; not imported, it needs torch).
_PROVENANCE = "adaptd.json"
_SAMPLE = "Speculative decoding: 3 × 14 = 42, naïvely?"
_MESSAGES = [{"role": "user", "content": _SAMPLE}]

State = Literal["ok", "warning", "failed"]


class Finding(NamedTuple):
    """One line of the report, as `adaptd.app.doctor.Check`; `remedy` is empty when `state` is ok."""

    name: str
    state: State
    found: str
    remedy: str = ""


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What this deployment takes for granted of its server."""

    #: Tokens proposed a round, as the gate scores them.
    k: int
    #: Log-probabilities asked for at each position.
    top_logprobs: int = 0
    #: What acceptance means to learner and gate.
    draft_sampling: Literal["greedy", "probabilistic"] = "greedy"
    #: `ScopeConfig.to_dict()` of the drafts that will be published; None: nothing is published.
    scope: Mapping[str, Any] | None = None
    #: Use a server that others can reach, development routes and all.
    allow_remote: bool = False
    #: Token ids of a text, and of messages through the chat template, by the target's tokenizer as it is here.
    tokenize: Callable[[str], list[int]] | None = None
    render: Callable[[list[dict[str, str]]], list[int]] | None = None


def run_checks(url: str, expected: Expected, headers: Mapping[str, str] | None = None) -> list[Finding]:
    """All findings, in order; one that cannot be made says so and does not stop the next."""

    async def main() -> list[Finding]:
        client = VllmClient(url, headers=headers, timeout_s=60.0)
        try:
            return [finding async for finding in check_server(client, expected)]
        finally:
            await client.close()

    return asyncio.run(main())


async def check_server(client: VllmClient, expected: Expected) -> AsyncIterator[Finding]:
    """The findings of one server."""
    local = is_loopback(client.url)
    if not local:
        state: State = "warning" if expected.allow_remote else "failed"
        yield Finding(
            "address",
            state,
            f"{client.url} can be reached by others, and vLLM's API key does not cover its development routes: anybody "
            "who reaches them can replace weights",
            "listen on 127.0.0.1 or a unix socket (vllm serve --host 127.0.0.1, or --uds), with adaptd beside it; else "
            "keep others out by a network policy and allow it explicitly",
        )
    else:
        yield Finding("address", "ok", f"{client.url}: only this machine reaches it")
    try:
        models = await client.models()
    except (UpstreamUnavailable, UpstreamRefused) as error:
        yield Finding("server", "failed", str(error), "start the server, or correct the address and the API key")
        return
    names = ", ".join(str(m["id"]) for m in models)
    yield Finding("server", "ok", f"serves {names}")
    yield await _tokenizer(client, str(models[0]["id"]), expected)
    yield await _template(client, str(models[0]["id"]), expected)
    try:
        label = await client.weight_version()
        config = await client.config()
    except UpstreamRefused as error:
        yield Finding(
            "development routes",
            "failed",
            f"{error}: the draft cannot be updated, and the server's settings cannot be seen",
            "start the server with VLLM_SERVER_DEV_MODE=1, on loopback only",
        )
        return
    except UpstreamUnavailable as error:
        yield Finding("server", "failed", str(error), "is it stopping?")
        return
    yield Finding("development routes", "ok", f"there; the server holds weights {label!r}")
    for finding in check_config(config, expected):
        yield finding
    yield await _asleep(client, config)


def check_config(config: Mapping[str, Any], expected: Expected) -> Iterator[Finding]:
    """Findings in the server's resolved configuration (`/server_info`)."""
    speculative = config.get("speculative_config") or {}
    if not speculative:
        yield Finding(
            "speculation",
            "failed",
            "the server does not speculate",
            "start it with --speculative-config and method draft_model",
        )
        return
    yield from _speculation(speculative, expected)
    yield from _drafts_weights(config, speculative, expected)
    yield from _capture(config, expected)
    if (config.get("cache_config") or {}).get("enable_prefix_caching"):
        found = (
            "on: cached blocks keep what an earlier draft version computed, which costs acceptance there, never text"
        )
        yield Finding("prefix cache", "ok", found)
    if config.get("lora_config"):
        yield Finding(
            "target LoRA",
            "warning",
            "the server serves LoRA adapters of the target; its draft does not know them",
            "label their traffic (x-adaptd-domain), or serve them from another server",
        )


def _speculation(speculative: Mapping[str, Any], expected: Expected) -> Iterator[Finding]:
    method, k = str(speculative.get("method")), speculative.get("num_speculative_tokens")
    try:
        draft_kind(method)
        yield Finding("draft kind", "ok", f"{method}, {k} tokens a round")
    except ConfigError as error:
        yield Finding("draft kind", "failed", str(error), "adaptd adapts independent small models: method draft_model")
    if k != expected.k:
        yield Finding(
            "depth",
            "warning",
            f"the server proposes {k} tokens a round, the gate scores {expected.k}",
            f"set engine.k: {k}",
        )
    sampling = speculative.get("draft_sample_method", "greedy")
    if sampling != expected.draft_sampling:
        yield Finding(
            "draft sampling",
            "failed",
            f"the server's draft_sample_method is {sampling}, learner and gate assume {expected.draft_sampling}",
            f"set upstream.draft_sampling: {sampling}",
        )
    else:
        yield Finding("draft sampling", "ok", f"{sampling}, as learner and gate assume")
    rejection = speculative.get("rejection_sample_method", "standard")
    if rejection not in ("standard", "block"):
        yield Finding(
            "rejection sampling",
            "warning",
            f"{rejection}: accepts tokens that the target would not have chosen",
            "use rejection_sample_method standard or block, or mistrust acceptance",
        )
    if speculative.get("use_heterogeneous_vocab"):
        yield Finding(
            "draft vocabulary",
            "failed",
            "the draft has another vocabulary than the target",
            "use a draft with the target's tokenizer, without use_heterogeneous_vocab",
        )


def _drafts_weights(config: Mapping[str, Any], speculative: Mapping[str, Any], expected: Expected) -> Iterator[Finding]:
    backend = (config.get("weight_transfer_config") or {}).get("backend")
    if backend == BACKEND:
        # The engine would not have started without the class behind the name.
        yield Finding("plugin", "ok", f"weight transfer by {BACKEND}")
    else:
        yield Finding(
            "plugin",
            "failed",
            f"the server's weight transfer is {backend or 'not configured'}",
            "pip install --no-deps adaptd into the server's environment and start it with "
            f'--weight-transfer-config \'{{"backend": "{BACKEND}"}}\'; if VLLM_PLUGINS is set it must list adaptd',
        )
    folder = Path(str(speculative.get("model")))
    remedy = "write the folder with `adaptd export --prepare` and start the server with it"
    if not folder.is_dir():
        yield Finding(
            "draft folder", "warning", f"the server drafts with {folder}, which cannot be seen from here", remedy
        )
        return
    try:
        about = json.loads((folder / _PROVENANCE).read_text(encoding="utf-8"))
        architecture = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        yield Finding("draft folder", "failed", f"{folder} was not prepared by adaptd: its shapes will not fit", remedy)
        return
    scope = about.get("scope_config")
    if expected.scope is not None and scope != dict(expected.scope):
        differing = sorted(k for k, v in expected.scope.items() if (scope or {}).get(k) != v)
        yield Finding(
            "draft folder", "failed", f"{folder} was prepared for another adapt configuration: {differing}", remedy
        )
    else:
        yield Finding("draft folder", "ok", f"{folder}: prepared, version {about.get('version')}")
    if architecture.get("tie_word_embeddings"):
        yield Finding(
            "tied head",
            "warning",
            "the draft's head and embedding are one tensor on disk and two in the server: an update of one would break it",
            remedy,
        )
    else:
        yield Finding("tied head", "ok", "the draft's embedding and head are tensors of their own, and never sent")


def _capture(config: Mapping[str, Any], expected: Expected) -> Iterator[Finding]:
    model, observed = config.get("model_config") or {}, config.get("observability_config") or {}
    level = observed.get("per_request_spec_decode_metrics")
    if level == "detailed":
        yield Finding("per-request metrics", "ok", "detailed")
    else:
        yield Finding(
            "per-request metrics",
            "failed",
            f"{level or 'off'}: answers do not say which proposals were accepted",
            "start the server with --per-request-spec-decode-metrics detailed",
        )
    depth = model.get("max_logprobs", 0)
    if depth != -1 and depth < expected.top_logprobs:
        yield Finding(
            "--max-logprobs",
            "failed",
            f"{depth}, but {expected.top_logprobs} are asked for at each position",
            f"start the server with --max-logprobs {expected.top_logprobs}, or ask for fewer",
        )
    else:
        yield Finding("--max-logprobs", "ok", "unlimited" if depth == -1 else str(depth))
    mode = model.get("logprobs_mode", "raw_logprobs")
    if mode != "raw_logprobs":
        yield Finding(
            "--logprobs-mode",
            "failed",
            f"{mode}: not the target's distribution at temperature 1",
            "start the server with --logprobs-mode raw_logprobs",
        )
    if model.get("enable_sleep_mode") and "draft.*" not in (model.get("sleep_preserve_parameter_names") or []):
        yield Finding(
            "sleep mode",
            "warning",
            "on: sleep of level 2 throws the draft's weights away, silently; adaptd brings them back after the wake-up",
            "use level 1, or keep `draft.*` in sleep_preserve_parameter_names",
        )


async def _asleep(client: VllmClient, config: Mapping[str, Any]) -> Finding:
    try:
        if await client.sleeping():
            return Finding("awake", "warning", "the server sleeps", "wake it up: POST /wake_up")
        if await client.paused():
            return Finding("awake", "warning", "the server is paused: requests wait", "POST /resume")
    except (UpstreamUnavailable, UpstreamRefused) as error:
        return Finding("awake", "warning", str(error), "is the server up?")
    return Finding("awake", "ok", "takes requests")


async def _tokenizer(client: VllmClient, model: str, expected: Expected) -> Finding:
    if expected.tokenize is None:
        return Finding("vocabulary", "warning", "not compared: no tokenizer is configured here", "set target.model")
    ours = expected.tokenize
    return await _same(
        "vocabulary",
        lambda: client.tokenize(model, prompt=_SAMPLE),
        lambda: ours(_SAMPLE),
        "set target.model to the model that the server serves",
    )


async def _template(client: VllmClient, model: str, expected: Expected) -> Finding:
    if expected.render is None:
        return Finding("chat template", "warning", "not compared: no template is configured here", "set target.model")
    ours = expected.render
    return await _same(
        "chat template",
        lambda: client.tokenize(model, messages=_MESSAGES),
        lambda: ours(_MESSAGES),
        "use the server's template here (--chat-template there, chat_template.jinja in target.model)",
    )


async def _same(
    name: str, theirs: Callable[[], Coroutine[Any, Any, list[int]]], ours: Callable[[], list[int]], remedy: str
) -> Finding:
    """Both sides' tokens of one sample: anything that is not the same would train on other contexts."""
    try:
        there, here = await theirs(), ours()
    except (UpstreamRefused, UpstreamUnavailable, AdaptdError) as error:
        return Finding(name, "warning", f"not compared: {error}", remedy)
    if there == here:
        return Finding(name, "ok", f"{len(here)} tokens of a sample, the same as here")
    at = next((i for i, (a, b) in enumerate(zip(there, here, strict=False)) if a != b), min(len(there), len(here)))
    return Finding(
        name, "failed", f"a sample is {len(there)} tokens there and {len(here)} here, from token {at}", remedy
    )
