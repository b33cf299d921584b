"""The low-rank correction of the output head."""

import pytest
import torch

from adaptd.models import head
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
