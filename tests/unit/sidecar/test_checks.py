"""Doctor's findings about a vLLM server: each trap that can be seen from outside, with its remedy."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from adaptd.models.fold import PROVENANCE
from adaptd.sidecar import checks
from adaptd.sidecar.checks import Expected, Finding, check_config, check_server
from adaptd.sidecar.client import VllmClient
from tests.unit.sidecar.fake_vllm import FakeVllm

SCOPE = {"scope": "private_expert", "width": 128, "gated": False}
EXPECTED = Expected(k=4, top_logprobs=20, scope=SCOPE)


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    """What `/server_info` of vLLM 0.32 says of a server started as documented."""
    (tmp_path / "config.json").write_text(json.dumps({"tie_word_embeddings": False}))
    (tmp_path / PROVENANCE).write_text(json.dumps({"version": 0, "scope_config": SCOPE}))
    return {
        "speculative_config": {
            "method": "draft_model",
            "model": str(tmp_path),
            "num_speculative_tokens": 4,
            "draft_sample_method": "greedy",
            "rejection_sample_method": "standard",
            "use_heterogeneous_vocab": False,
        },
        "weight_transfer_config": {"backend": "adaptd_disk"},
        "model_config": {
            "max_logprobs": 20,
            "logprobs_mode": "raw_logprobs",
            "enable_sleep_mode": False,
            "sleep_preserve_parameter_names": [],
        },
        "observability_config": {"per_request_spec_decode_metrics": "detailed"},
        "cache_config": {"enable_prefix_caching": True},
        "lora_config": None,
    }


def test_the_name_of_the_provenance_file_is_that_which_export_writes() -> None:
    assert checks._PROVENANCE == PROVENANCE


def test_a_server_started_as_documented_has_no_finding(config: dict[str, Any]) -> None:
    assert [f for f in check_config(config, EXPECTED) if f.state != "ok"] == []


@pytest.mark.parametrize(
    ("section", "values", "name", "state", "remedy"),
    [
        ("speculative_config", None, "speculation", "failed", "--speculative-config"),
        ("speculative_config", {"method": "ngram"}, "draft kind", "failed", "draft_model"),
        ("speculative_config", {"method": "eagle3"}, "draft kind", "failed", "draft_model"),
        ("speculative_config", {"num_speculative_tokens": 5}, "depth", "warning", "engine.k: 5"),
        ("speculative_config", {"draft_sample_method": "probabilistic"}, "draft sampling", "failed", "probabilistic"),
        ("speculative_config", {"rejection_sample_method": "synthetic"}, "rejection sampling", "warning", "standard"),
        ("speculative_config", {"use_heterogeneous_vocab": True}, "draft vocabulary", "failed", "tokenizer"),
        ("speculative_config", {"model": "org/draft"}, "draft folder", "warning", "--prepare"),
        ("weight_transfer_config", None, "plugin", "failed", "--weight-transfer-config"),
        ("weight_transfer_config", {"backend": "ipc"}, "plugin", "failed", "--no-deps"),
        (
            "observability_config",
            {"per_request_spec_decode_metrics": "summary"},
            "per-request metrics",
            "failed",
            "--per",
        ),
        ("model_config", {"max_logprobs": 5}, "--max-logprobs", "failed", "--max-logprobs 20"),
        ("model_config", {"logprobs_mode": "processed_logprobs"}, "--logprobs-mode", "failed", "raw_logprobs"),
        ("model_config", {"enable_sleep_mode": True}, "sleep mode", "warning", "level 1"),
        ("lora_config", {"max_loras": 1}, "target LoRA", "warning", "another server"),
    ],
)
def test_each_trap_is_found_with_its_remedy(
    config: dict[str, Any], section: str, values: dict[str, Any] | None, name: str, state: str, remedy: str
) -> None:
    config[section] = None if values is None else {**(config[section] or {}), **values}
    found = {f.name: f for f in check_config(config, EXPECTED)}
    assert found[name].state == state
    assert remedy in found[name].remedy
    others = {f.name for f in found.values() if f.state != "ok"} - {name}
    assert not others, others


def test_unlimited_logprobs_are_enough(config: dict[str, Any]) -> None:
    config["model_config"]["max_logprobs"] = -1
    assert {f.name: f.state for f in check_config(config, EXPECTED)}["--max-logprobs"] == "ok"


def test_sleep_that_keeps_the_draft_is_no_trap(config: dict[str, Any]) -> None:
    config["model_config"] |= {"enable_sleep_mode": True, "sleep_preserve_parameter_names": ["draft.*"]}
    assert "sleep mode" not in {f.name for f in check_config(config, EXPECTED)}


def test_a_draft_prepared_for_another_scope_names_what_differs(config: dict[str, Any]) -> None:
    found = {f.name: f for f in check_config(config, Expected(k=4, scope={**SCOPE, "width": 64}))}
    assert found["draft folder"].state == "failed"
    assert "width" in found["draft folder"].found


def test_a_draft_folder_that_adaptd_did_not_write_is_found(config: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / PROVENANCE).unlink()
    found = {f.name: f for f in check_config(config, EXPECTED)}
    assert found["draft folder"].state == "failed"


def test_a_tied_draft_is_found(config: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"tie_word_embeddings": True}))
    assert {f.name: f.state for f in check_config(config, EXPECTED)}["tied head"] == "warning"


async def _all(url: str, server: FakeVllm, expected: Expected) -> dict[str, Finding]:
    client = VllmClient(url, transport=httpx.MockTransport(server.handler))
    return {f.name: f async for f in check_server(client, expected)}


def collect(url: str, server: FakeVllm, expected: Expected = EXPECTED) -> dict[str, Finding]:
    import asyncio

    return asyncio.run(_all(url, server, expected))


def test_a_server_that_others_reach_is_refused_unless_that_is_allowed() -> None:
    """Development routes have no key: whoever reaches them can replace the model."""
    refused = collect("http://10.0.0.7:8000", FakeVllm())["address"]
    assert refused.state == "failed"
    assert "127.0.0.1" in refused.remedy
    allowed = Expected(k=4, allow_remote=True)
    assert collect("http://10.0.0.7:8000", FakeVllm(), allowed)["address"].state == "warning"
    assert collect("http://127.0.0.1:8000", FakeVllm())["address"].state == "ok"


def test_a_server_without_development_routes_is_told_how_to_get_them() -> None:
    server = FakeVllm()
    server.fail("/weight_info", httpx.Response(404, json={"detail": "Not Found"}))
    found = collect("http://127.0.0.1:1", server)
    assert found["development routes"].state == "failed"
    assert "VLLM_SERVER_DEV_MODE=1" in found["development routes"].remedy


def test_a_server_that_is_down_is_one_finding_not_a_traceback() -> None:
    server = FakeVllm()
    server.fail("/v1/models", httpx.ConnectError("refused"))
    assert collect("http://127.0.0.1:1", server)["server"].state == "failed"


def test_another_tokenizer_or_template_is_found_at_its_first_token(config: dict[str, Any]) -> None:
    server = FakeVllm()
    server.config = config
    expected = Expected(k=4, scope=SCOPE, tokenize=lambda text: [1, 2, 3], render=lambda messages: [1, 2, 3])
    server.tokens = [1, 2, 3]
    assert {f.state for f in collect("http://127.0.0.1:1", server, expected).values()} == {"ok"}
    server.tokens = [1, 9, 3]
    found = collect("http://127.0.0.1:1", server, expected)
    assert found["vocabulary"].state == found["chat template"].state == "failed"
    assert "from token 1" in found["vocabulary"].found


@pytest.mark.parametrize(("state", "remedy"), [("paused", "/resume"), ("sleeps", "/wake_up")])
def test_a_server_that_takes_no_requests_is_found(config: dict[str, Any], state: str, remedy: str) -> None:
    server = FakeVllm()
    server.config = config
    setattr(server, state, True)
    found = collect("http://127.0.0.1:1", server)["awake"]
    assert (found.state, remedy in found.remedy) == ("warning", True)
