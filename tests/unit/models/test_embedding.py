"""The low-rank correction of the input embedding."""

import pytest
import torch

from adaptd.errors import ConfigError
from adaptd.models.scope import AdaptedDraft, ScopeConfig

CONFIG = ScopeConfig(scope="lora", lora_rank=2, embed_rank=3)
IDS = torch.tensor([[1, 4, 4, 2]])


def moved(make_model, kind="llama", **form):
    draft = AdaptedDraft(make_model(kind), CONFIG, **form)
    generator = torch.Generator().manual_seed(2)
    draft.load({name: torch.randn(t.shape, generator=generator) * 0.3 for name, t in draft.expected().items()})
    return draft


@pytest.mark.parametrize("serving", [False, True])
@pytest.mark.parametrize("kind", ["llama", "llama_untied_biased", "gpt2"])
def test_an_embedding_is_the_table_plus_low_rank(make_model, kind, serving):
    draft = moved(make_model, kind, serving=serving)
    state = draft.state()
    up = next(t for n, t in state.items() if n.endswith("low_rank.up.weight"))
    down = next(t for n, t in state.items() if n.endswith("low_rank.down.weight"))
    table = make_model(kind).get_input_embeddings().weight.detach()
    torch.testing.assert_close(draft.model.get_input_embeddings()(IDS).detach(), table[IDS] + up[IDS] @ down)


@pytest.mark.parametrize("serving", [False, True])
def test_day_0_is_the_base_and_a_tied_head_stays_as_it_was(make_model, serving):
    base = make_model()
    expected = base(IDS).logits
    draft = AdaptedDraft(make_model(), CONFIG, serving=serving)
    torch.testing.assert_close(draft.model(IDS).logits, expected)
    table = base.model.embed_tokens.weight
    draft.load({name: torch.ones_like(t) for name, t in draft.expected().items()})
    assert torch.equal(draft.model.lm_head.weight, table)
    draft.model.tie_weights()
    assert torch.equal(draft.model.lm_head.weight, table), "Hugging Face code that ties weights changes nothing"
    draft.load({})
    torch.testing.assert_close(draft.model(IDS).logits, expected)


def test_training_serving_and_folded_forms_agree(make_model):
    training, serving = moved(make_model), moved(make_model, serving=True)
    expected = training.model(IDS).logits
    torch.testing.assert_close(serving.model(IDS).logits, expected, atol=1e-4, rtol=1e-4)
    folded = serving.fold()
    torch.testing.assert_close(folded(IDS).logits, expected, atol=1e-4, rtol=1e-4)
    assert not folded.config.tie_word_embeddings


def test_a_negative_rank_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"embed_rank \(-1\) must be at least 0"):
        ScopeConfig(embed_rank=-1)
