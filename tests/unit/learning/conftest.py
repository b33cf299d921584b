"""A tiny target, a draft that is right now and then, and traces that real decoding with the two left behind."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from adaptd.decoding.capture import CaptureConfig
from adaptd.decoding.engine import SpeculativeDecoder
from adaptd.decoding.request import DecodeRequest, Finished, SamplingParams

VOCAB = 64
K = 3


def tiny(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture(scope="session")
def target() -> LlamaForCausalLM:
    return tiny(0)


@pytest.fixture(scope="session")
def draft(target: LlamaForCausalLM) -> LlamaForCausalLM:
    """The target with noise on its weights: accepted about half of the time."""
    model = tiny(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return model


Decode = Callable[..., list[Finished]]


@pytest.fixture(scope="session")
def decode(target: LlamaForCausalLM) -> Decode:
    def run(
        draft: torch.nn.Module, n: int, *, temperature: float, max_tokens: int = 24, seed: int = 0
    ) -> list[Finished]:
        rng = np.random.default_rng(seed)
        engine = SpeculativeDecoder(
            target, draft, k=K, max_batch=16, max_length=96, capture=CaptureConfig(k_top=16, reserved_share=0.0)
        )
        prompts: Sequence[Sequence[int]] = [rng.integers(0, VOCAB, rng.integers(2, 10)).tolist() for _ in range(n)]
        params = [SamplingParams(temperature=temperature, max_tokens=max_tokens, seed=i) for i in range(n)]
        waiting = [DecodeRequest(f"r{i}", p, s) for i, (p, s) in enumerate(zip(prompts, params, strict=True))]
        done: list[Finished] = []
        while waiting or engine.active:
            while waiting and engine.can_add():
                engine.add(waiting.pop())
            done += [d.finished for d in engine.step() if d.finished is not None]
        return done

    return run
