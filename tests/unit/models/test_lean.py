"""The lean forward pass is transformers' own, to rounding, for every architecture that it takes."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from adaptd.decoding.runner import ModelRunner
from adaptd.models.lean import can_run
from adaptd.models.packed import can_pack, pack_linears
from adaptd.models.scope import AdaptedDraft, ScopeConfig

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
CASES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "biases": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True}),
    "llama3 positions": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": LLAMA3}),
    "yarn positions": (Qwen3Config, Qwen3ForCausalLM, {"rope_parameters": YARN}),
    "one head for each": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 8}),
    "another activation": (LlamaConfig, LlamaForCausalLM, {"hidden_act": "gelu"}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 48}),
    "window": (MistralConfig, MistralForCausalLM, {"sliding_window": 8}),
    "window in some layers": (
        Qwen2Config,
        Qwen2ForCausalLM,
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
}


def model(name: str, **extra: object) -> Any:
    torch.manual_seed(0)
    config, kind, more = CASES[name]
    settings = {
        "vocab_size": 128,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "attn_implementation": "sdpa",
    }
    made = kind(config(**(settings | more | extra))).eval().requires_grad_(False)
    for parameter in made.parameters():  # norms and biases start as ones and zeros, which hide mistakes
        parameter.add_(torch.randn_like(parameter) * 0.05)
    return made


@torch.inference_mode()
def passes(runner: ModelRunner) -> tuple[Tensor, Tensor]:
    """Prompts of three rows, then two more tokens of each, where it ends."""
    tokens = torch.randint(0, 128, (3, 20), generator=torch.Generator().manual_seed(1))
    start = torch.arange(20).expand(3, 20)
    first = runner.forward(tokens, start, runner.masks(start, 32), 0, 32, last_only=True)
    behind = torch.tensor([[20, 21], [11, 12], [16, 17]])
    return first, runner.forward(tokens[:, :2], behind, runner.masks(behind, 32), 0, 32, last_only=False)


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_the_same_logits(name: str, pack: bool) -> None:
    whole = model(name)
    if pack and can_pack(torch.float32):
        assert pack_linears(whole, rows=5) > 0
    lean, theirs = (ModelRunner(whole, slots=3, capacity=64, max_length=60) for _ in range(2))
    assert lean._lean is not None
    theirs._lean = None
    for got, right in zip(passes(lean), passes(theirs), strict=True):
        torch.testing.assert_close(got, right, atol=2e-5 * float(right.abs().max()), rtol=0)


@pytest.mark.parametrize(
    "scope",
    [
        ScopeConfig(width=32, head_rank=8),
        ScopeConfig(width=32, head_rank=8, lora_targets=("q_proj", "v_proj")),
        ScopeConfig(scope="lora", lora_rank=4, request_gate=True),
    ],
    ids=["default", "some layers", "lora everywhere"],
)
@pytest.mark.parametrize("name", ["llama", "biases", "qwen3"])
def test_an_adapted_draft_is_what_transformers_makes_of_it(name: str, scope: ScopeConfig) -> None:
    """LoRA on siblings and the head's correction are wide matrices here; transformers calls layer by layer."""
    draft = AdaptedDraft(model(name), scope, serving=True)
    lean, theirs = (ModelRunner(draft.model, slots=3, capacity=64, max_length=60) for _ in range(2))
    theirs._lean = None
    for seed in (2, 3):  # learned, and swapped for what was learned then
        generator = torch.Generator().manual_seed(seed)
        draft.load({n: 0.1 * torch.randn(t.shape, generator=generator) for n, t in draft.state().items()})
        for runner in (lean, theirs):
            runner._openness = torch.tensor([0.0, 0.5, 2.0])[:, None, None]
        found = [passes(runner) for runner in (lean, theirs)]
        for got, right in zip(*found, strict=True):
            torch.testing.assert_close(got, right, atol=2e-5 * float(right.abs().max()), rtol=0)


def test_layers_that_read_the_same_are_one_product_where_all_of_them_have_lora() -> None:
    whole, some = (
        AdaptedDraft(model("llama"), ScopeConfig(width=32, lora_targets=targets), serving=True).model
        for targets in (None, ("q_proj", "v_proj"))
    )
    together, apart = (m.model.layers[0].self_attn for m in (whole, some))
    assert together.q_proj.wide is together.k_proj.wide is together.v_proj.wide
    assert not together.q_proj.wide.alone
    assert together.o_proj.wide.alone
    assert apart.q_proj.wide is not apart.v_proj.wide


def test_the_same_cache() -> None:
    """A pass by one of them can follow a pass by the other."""
    whole = model("qwen3")
    lean, theirs = (ModelRunner(whole, slots=3, capacity=64, max_length=60) for _ in range(2))
    theirs._lean = None
    for runner in (lean, theirs):
        passes(runner)
    for ours, right in zip(lean.cache.layers, theirs.cache.layers, strict=True):
        torch.testing.assert_close(ours.keys, right.keys, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(ours.values, right.values, atol=1e-5, rtol=1e-4)


def test_changed_weights_act_at_once() -> None:
    """What a swap does: the same modules, other values."""
    whole = model("llama")
    runner = ModelRunner(whole, slots=3, capacity=64, max_length=60)
    before = passes(runner)[1]
    for parameter in whole.parameters():
        parameter.mul_(1.01)
    assert not torch.allclose(passes(runner)[1], before)


def test_what_is_not_known_goes_through_transformers() -> None:
    other = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=64)).eval()
    dynamic = model("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0})
    eager = model("llama", attn_implementation="eager")
    for whole in (other, dynamic, eager, nn.Linear(2, 2)):
        assert not can_run(whole)
