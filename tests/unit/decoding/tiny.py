"""Tiny models that are not degenerate: weights wide enough that tokens differ, drafts close enough to be accepted."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen3Config, Qwen3ForCausalLM

from adaptd.decoding.engine import SpeculativeDecoder
from adaptd.decoding.request import DecodeRequest, Finished

KINDS = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}


def make_model(kind: str = "llama", *, seed: int = 0, vocab: int = 97, layers: int = 2, **extra: object) -> nn.Module:
    torch.manual_seed(seed)
    config_class, model_class = KINDS[kind]
    settings = {
        "vocab_size": vocab,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
        "eos_token_id": None,
        "bos_token_id": None,
        "pad_token_id": None,
    }
    return model_class(config_class(**(settings | extra))).eval()


def make_draft(target: nn.Module, *, noise: float = 0.02, seed: int = 1) -> nn.Module:
    """A copy of the target with noisy weights: a draft that is often, but not always, right."""
    draft = copy.deepcopy(target)
    disturb(draft, noise, seed)
    return draft


def disturb(model: nn.Module, noise: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * noise)


def make_prompts(count: int, vocab: int, *, shortest: int = 1, longest: int = 40, seed: int = 7) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(shortest, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(0, vocab, (size,), generator=generator).tolist() for size in sizes]


def greedy_reference(model: nn.Module, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
    """What transformers' own greedy decoding gives, one prompt at a time."""
    answers = []
    for prompt in prompts:
        ids = torch.tensor([list(prompt)])
        # Without the mask, generate() would take a token equal to the padding id for padding.
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False)
        answers.append(out[0, len(prompt) :].tolist())
    return answers


def serve(
    engine: SpeculativeDecoder,
    requests: Iterable[DecodeRequest],
    between: Callable[[int], None] = lambda round_: None,
) -> dict[str, Finished]:
    """Feeds requests as slots become free and steps to the end; `between` runs after every step."""
    waiting, done, rounds = list(requests), {}, 0
    while waiting or engine.active:
        while waiting and engine.can_add():
            engine.add(waiting.pop(0))
        for delta in engine.step():
            if delta.finished is not None:
                done[delta.request_id] = delta.finished
        rounds += 1
        between(rounds)
    return done
