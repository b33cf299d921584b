"""Tiny seeded models of four architectures; every weight is random, biases and norms included."""

from collections.abc import Callable

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB = 48
SIZES = {"vocab_size": VOCAB, "hidden_size": 16, "num_attention_heads": 2}

MakeModel = Callable[..., PreTrainedModel]


@pytest.fixture
def make_model() -> MakeModel:
    """`make(kind, seed=0, dtype=torch.float32, layers=2)`: the same weights for the same arguments."""

    def make(
        kind: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32, layers: int = 2
    ) -> PreTrainedModel:
        common = {
            **SIZES,
            "num_hidden_layers": layers,
            "max_position_embeddings": 64,
            "tie_word_embeddings": kind != "llama_untied_biased",
        }
        torch.manual_seed(seed)
        match kind:
            case "llama":
                model = LlamaForCausalLM(LlamaConfig(intermediate_size=40, num_key_value_heads=1, **common))
            case "llama_untied_biased":
                biased = {"mlp_bias": True, "attention_bias": True}
                model = LlamaForCausalLM(LlamaConfig(intermediate_size=40, num_key_value_heads=1, **biased, **common))
            case "qwen3":
                model = Qwen3ForCausalLM(Qwen3Config(intermediate_size=40, num_key_value_heads=1, head_dim=8, **common))
            case "gpt2":
                gpt2 = GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=layers, n_head=2, n_positions=64)
                gpt2.bos_token_id = gpt2.eos_token_id = 0
                model = GPT2LMHeadModel(gpt2)
            case "opt":
                model = OPTForCausalLM(OPTConfig(ffn_dim=40, word_embed_proj_dim=16, **common))
        with torch.no_grad():
            for parameter in model.parameters():
                # Of order one over the square root of the fan-in, so that every layer matters to the logits.
                parameter.add_(torch.randn_like(parameter) * 0.2)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        return model.eval()

    return make


@pytest.fixture
def ids() -> torch.Tensor:
    """[3, 7] token ids, none of them special."""
    return torch.randint(4, VOCAB, (3, 7), generator=torch.Generator().manual_seed(1))
