"""The request gate: one at day 0, shut it is the base, told apart by prompts, the same in both forms."""

import numpy as np
import pytest
import torch

from adaptd.errors import ConfigError
from adaptd.models.request_gate import conditioned, request_gate
from adaptd.models.scope import AdaptedDraft, ScopeConfig

CONFIG = ScopeConfig(width=12, lora_rank=4, head_rank=3, embed_rank=3)
INSIDE = ScopeConfig(width=12, lora_rank=4, lora_targets=("gate_proj", "down_proj"), request_gate=True)


def learned_draft(make_model, config=CONFIG, *, serving=False, kind="llama") -> AdaptedDraft:
    draft = AdaptedDraft(make_model(kind), config, serving=serving)
    generator = torch.Generator().manual_seed(3)
    draft.load({n: torch.randn(t.shape, generator=generator) * 0.2 for n, t in draft.expected().items()})
    return draft


@torch.no_grad()
def logits(draft: AdaptedDraft, ids: torch.Tensor, openness: list[float] | None) -> torch.Tensor:
    value = None if openness is None else torch.tensor(openness)[:, None, None]
    with conditioned(draft.model, value):
        return draft.model(input_ids=ids).logits


@pytest.mark.parametrize("serving", [False, True])
@pytest.mark.parametrize("config", [CONFIG, INSIDE])
def test_a_shut_gate_is_the_base_and_an_open_one_what_was_learned_each_for_its_row(make_model, ids, config, serving):
    draft = learned_draft(make_model, config, serving=serving)
    with torch.no_grad():
        base = make_model()(input_ids=ids).logits
    learned = logits(draft, ids, None)
    mixed = logits(draft, ids, [0.0, 1.0, 0.0])
    assert (learned - base).abs().max() > 0.1
    torch.testing.assert_close(mixed[[0, 2]], base[[0, 2]], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mixed[1], learned[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
def test_both_forms_agree_at_any_openness(make_model, ids, kind):
    training, serving = (learned_draft(make_model, serving=s, kind=kind) for s in (False, True))
    openness = [0.3, 1.7, 0.9]
    torch.testing.assert_close(logits(serving, ids, openness), logits(training, ids, openness), atol=1e-4, rtol=1e-4)


def test_it_starts_at_one_whatever_the_prompt(make_model):
    gate = request_gate(AdaptedDraft(make_model(), CONFIG).model)
    assert gate is not None
    assert not gate.centred
    torch.testing.assert_close(gate(gate.features([[5, 6, 7], [9]])), torch.ones(2, 1, 1))


def test_prompts_are_told_apart_once_the_centre_is_known(make_model):
    gate = request_gate(AdaptedDraft(make_model(), CONFIG).model)
    assert gate is not None
    first, second = [[5, 6, 7, 8], [6, 7, 8, 9]], [[30, 31, 32], [31, 32, 33]]
    gate.centre_on(first)
    assert gate.centred
    features = gate.features(np.array(p) for p in [*first, *second])
    target = torch.tensor([0.0, 0.0, 2.0, 2.0])
    optimiser = torch.optim.Adam([gate.weight, gate.bias], lr=0.05)
    gate.weight.requires_grad_(True)
    gate.bias.requires_grad_(True)
    for _ in range(100):
        optimiser.zero_grad()
        (gate(features).flatten() - target).square().sum().backward()
        optimiser.step()
    shut, opened = gate(features).flatten()[:2], gate(features).flatten()[2:]
    assert shut.max() < 0.3
    assert opened.min() > 1.7


def test_openness_ends_with_its_forward_passes(make_model, ids):
    draft = learned_draft(make_model)
    before = logits(draft, ids, None)
    with pytest.raises(RuntimeError, match="stop"), conditioned(draft.model, torch.zeros(3, 1, 1)):
        raise RuntimeError("stop")
    torch.testing.assert_close(logits(draft, ids, None), before)


def test_a_gated_draft_cannot_be_folded_and_says_what_to_set(make_model):
    draft = AdaptedDraft(make_model(), ScopeConfig(scope="lora", lora_rank=4, request_gate=True))
    with pytest.raises(ConfigError, match="request_gate: false"):
        draft.fold()
