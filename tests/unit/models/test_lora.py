"""LoRA: the formula, the names, and the layers found."""

import pytest
import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

from adaptd.models.layers import attention_layers, linear_layers
from adaptd.models.scope import AdaptedDraft, ScopeConfig


def randomise(draft):
    generator = torch.Generator().manual_seed(5)
    draft.load({name: torch.randn(t.shape, generator=generator) * 0.3 for name, t in draft.expected().items()})


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_merged_weight_is_the_base_plus_alpha_over_rank_b_a(make_model, kind):
    """GPT-2 stores its weights transposed; a merge that forgets it fails on shapes or, for square ones, silently."""
    draft = AdaptedDraft(make_model(kind), ScopeConfig(scope="lora", lora_rank=4, lora_alpha=6.0), serving=True)
    randomise(draft)
    name = "transformer.h.0.attn.c_proj" if kind == "gpt2" else "model.layers.0.self_attn.q_proj"
    state = draft.state()
    delta = 1.5 * state[f"{name}.lora_B.weight"] @ state[f"{name}.lora_A.weight"]
    base = make_model(kind).get_parameter(f"{name}.weight")
    expected = base + (delta.T if kind == "gpt2" else delta)
    torch.testing.assert_close(draft.model.get_parameter(f"{name}.weight"), expected.detach())


# peft 0.21 reads a name that transformers 5.23 deprecates.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_the_tensors_are_a_peft_adapter_under_its_prefix(make_model, ids):
    draft = AdaptedDraft(make_model(), ScopeConfig(scope="lora", lora_rank=4, lora_alpha=8.0))
    randomise(draft)
    settings = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    theirs = get_peft_model(make_model(), settings)
    tensors = {f"base_model.model.{name}": tensor for name, tensor in draft.state().items()}
    report = set_peft_model_state_dict(theirs, tensors)
    assert report.unexpected_keys == []
    with torch.no_grad():
        torch.testing.assert_close(theirs(input_ids=ids).logits, draft.model(input_ids=ids).logits)


@pytest.mark.parametrize(
    ("kind", "attention"),
    [
        ("llama", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("qwen3", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("gpt2", {"c_attn", "c_proj"}),
        ("opt", {"q_proj", "k_proj", "v_proj", "out_proj"}),
    ],
)
def test_attention_layers_are_found_by_structure(make_model, kind, attention):
    found = attention_layers(make_model(kind))
    assert {name.split(".")[-1] for name in found} == attention
    assert len(found) == 2 * len(attention)
    assert not any("mlp" in name for name in found)


@pytest.mark.parametrize("kind", ["llama", "llama_untied_biased", "gpt2", "opt"])
def test_the_output_head_is_never_a_linear_layer_to_adapt(make_model, kind):
    assert not any("lm_head" in name for name in linear_layers(make_model(kind)))


def test_targets_match_whole_names_at_the_end_of_a_path(make_model):
    draft = AdaptedDraft(make_model("gpt2"), ScopeConfig(scope="lora", lora_targets=("mlp.c_proj",)))
    layers = {name.rsplit(".", 2)[0] for name in draft.trainable()}
    assert layers == {"transformer.h.0.mlp.c_proj", "transformer.h.1.mlp.c_proj"}
