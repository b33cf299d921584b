"""The low-rank correction of the output head."""

import pytest
import torch

from adaptd.errors import ConfigError
from adaptd.models import head
from adaptd.models.private_expert import GATE_GAIN
from adaptd.models.scope import AdaptedDraft, ScopeConfig

CONFIG = ScopeConfig(scope="lora", lora_rank=2, head_rank=3)


@pytest.mark.parametrize("serving", [False, True])
@pytest.mark.parametrize("kind", ["llama", "llama_untied_biased"])
def test_logits_are_head_plus_low_rank_plus_bias(make_model, kind, serving):
    draft = AdaptedDraft(make_model(kind), CONFIG, serving=serving)
    generator = torch.Generator().manual_seed(2)
    draft.load({name: torch.randn(t.shape, generator=generator) for name, t in draft.expected().items()})
    state, weight = draft.state(), make_model(kind).lm_head.weight.detach()
    up, down = state["lm_head.low_rank.up.weight"], state["lm_head.low_rank.down.weight"]
    h = torch.randn(2, 5, 16, generator=generator)
    expected = h @ weight.T + (h @ down.T) @ up.T + state["lm_head.low_rank.bias"]
    torch.testing.assert_close(draft.model.lm_head(h).detach(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("serving", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_gate_scales_the_whole_correction(make_model, serving, bias):
    config = ScopeConfig(width=4, head_rank=3, head_bias=bias)
    draft = AdaptedDraft(make_model(), config, serving=serving)
    generator = torch.Generator().manual_seed(2)
    draft.load({name: torch.randn(t.shape, generator=generator) * 0.5 for name, t in draft.expected().items()})
    state, weight = draft.state(), make_model().lm_head.weight.detach()
    h = torch.randn(2, 5, 16, generator=generator)
    gate = 2 * torch.sigmoid(GATE_GAIN * h @ state["lm_head.low_rank.gate.weight"].T)
    assert gate.std() > 0.3
    correction = (h @ state["lm_head.low_rank.down.weight"].T) @ state["lm_head.low_rank.up.weight"].T
    correction = correction + state.get("lm_head.low_rank.bias", 0.0)
    expected = h @ weight.T + gate * correction
    torch.testing.assert_close(draft.model.lm_head(h).detach(), expected, atol=1e-4, rtol=1e-4)


def test_a_gated_correction_cannot_be_merged(make_model):
    draft = AdaptedDraft(make_model(), ScopeConfig(width=4, head_rank=3, head_bias=False))
    with pytest.raises(ConfigError, match="gated"):
        draft.fold()


@pytest.mark.parametrize("serving", [False, True])
def test_a_tied_embedding_is_never_touched(make_model, serving):
    draft = AdaptedDraft(make_model(), CONFIG, serving=serving)
    draft.load({name: torch.ones_like(t) for name, t in draft.expected().items()})
    assert torch.equal(draft.model.model.embed_tokens.weight, make_model().model.embed_tokens.weight)
    h = torch.ones(1, 16)
    before = draft.model.lm_head(h)
    draft.model.tie_weights()
    assert torch.equal(draft.model.lm_head(h), before), "Hugging Face code that ties weights must not undo the head"


def test_merging_in_blocks_of_rows_covers_every_row(monkeypatch):
    monkeypatch.setattr(head, "_MERGE_ROWS", 4)
    pristine, up, down = torch.randn(10, 6), torch.randn(10, 3), torch.randn(3, 6)
    out = torch.full((10, 6), float("nan"))
    head.merge(out, pristine, up, down)
    torch.testing.assert_close(out, pristine + up @ down)
