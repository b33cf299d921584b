"""The private expert: its formula, and folding the ungated pair into one dense FFN."""

import pytest
import torch
from torch import nn

from adaptd.errors import ConfigError
from adaptd.models.load import load_causal_lm
from adaptd.models.private_expert import GATE_GAIN, ExpertTensors, PrivateExpertFfn
from adaptd.models.request_gate import Openness
from adaptd.models.scope import AdaptedDraft, ScopeConfig

UNGATED = ScopeConfig(width=12, lora_rank=4, gated=False, head_rank=3, head_bias=False)


def randomise(draft):
    generator = torch.Generator().manual_seed(5)
    draft.load({name: torch.randn(t.shape, generator=generator) * 0.3 for name, t in draft.expected().items()})


def expert(*, gated, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    sizes = [(6, 4), (4, 3), (1, 4)] if gated else [(6, 4), (4, 3)]
    tensors = [nn.Parameter(torch.randn(size, generator=generator) * scale) for size in sizes]
    return ExpertTensors(*tensors) if gated else ExpertTensors(*tensors, None)


def test_the_output_is_the_shared_plus_the_gated_private():
    """h' = shared(h) + g private(h), g twice the private share of a softmax over two: the formula written out."""
    shared, tensors = nn.Linear(4, 4), expert(gated=True, scale=0.5)
    x = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(1))
    logit = GATE_GAIN * x @ tensors.gate.T
    gate = 2 * torch.softmax(torch.cat([torch.zeros_like(logit), logit], -1), -1)[..., 1:]
    first, second = (x @ tensors.up.T).split(3, -1)
    private = (nn.functional.silu(first) * second) @ tensors.down.T
    actual = PrivateExpertFfn(shared, tensors, gated_unit=True, activation=nn.functional.silu, openness=Openness())(x)
    torch.testing.assert_close(actual, shared(x) + gate * private)
    assert gate.std() > 0.3, "the gate must be open to both sides for this to mean anything"


def test_a_shut_gate_is_the_base_exactly():
    """What old traffic needs: the private expert has no say, and the shared one keeps its day-0 weight."""
    shared, tensors = nn.Linear(4, 4), expert(gated=True)
    x = torch.rand(7, 4) + 0.5
    module = PrivateExpertFfn(shared, tensors, gated_unit=True, activation=nn.functional.silu, openness=Openness())
    assert not torch.allclose(module(x), shared(x), atol=0.1)
    tensors.gate.data.fill_(-100.0)
    assert torch.equal(module(x), shared(x))


def test_a_gate_at_zero_is_held_at_one_exactly():
    shared, tensors = nn.Linear(4, 4), expert(gated=True)
    tensors.gate.data.zero_()
    x = torch.randn(7, 4)
    gated = PrivateExpertFfn(shared, tensors, gated_unit=True, activation=nn.functional.silu, openness=Openness())(x)
    ungated = PrivateExpertFfn(
        shared, tensors._replace(gate=None), gated_unit=True, activation=nn.functional.silu, openness=Openness()
    )(x)
    assert torch.equal(gated, ungated)


@pytest.mark.parametrize("serving", [False, True])
@pytest.mark.parametrize("kind", ["llama", "llama_untied_biased", "qwen3", "gpt2"])
def test_the_ungated_pair_folds_into_one_wider_dense_model(make_model, ids, kind, serving):
    draft = AdaptedDraft(make_model(kind), UNGATED, serving=serving)
    randomise(draft)
    folded = draft.fold()
    assert type(folded) is type(make_model(kind))
    with torch.no_grad():
        torch.testing.assert_close(
            folded(input_ids=ids).logits, draft.model(input_ids=ids).logits, atol=1e-4, rtol=1e-4
        )
    assert draft.fold().state_dict().keys() == folded.state_dict().keys(), "folding leaves the draft as it was"


def test_the_folded_ffn_is_the_two_experts_side_by_side_to_the_last_bit(make_model):
    draft = AdaptedDraft(make_model(), ScopeConfig(width=12, gated=False, lora_rank=0, head_rank=0))
    randomise(draft)
    mlp, base, learned = draft.fold().model.layers[1].mlp, make_model().model.layers[1].mlp, draft.state()
    up = learned["model.layers.1.mlp.private.up.weight"]
    assert torch.equal(mlp.gate_proj.weight, torch.cat([base.gate_proj.weight, up[:12]]))
    assert torch.equal(mlp.up_proj.weight, torch.cat([base.up_proj.weight, up[12:]]))
    down = learned["model.layers.1.mlp.private.down.weight"]
    assert torch.equal(mlp.down_proj.weight, torch.cat([base.down_proj.weight, down], 1))


def test_a_folded_model_saved_to_disk_is_an_ordinary_model(make_model, ids, tmp_path):
    draft = AdaptedDraft(make_model(), UNGATED)
    randomise(draft)
    draft.fold().save_pretrained(tmp_path)
    loaded = load_causal_lm(tmp_path, dtype="float32", device="cpu")
    assert loaded.config.intermediate_size == 52
    assert loaded.config.tie_word_embeddings is False
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(input_ids=ids).logits, draft.model(input_ids=ids).logits, atol=1e-4, rtol=1e-4
        )


def test_folding_at_day_0_widens_the_base_by_a_zero_expert(make_model, ids):
    folded = AdaptedDraft(make_model(), ScopeConfig(width=12, gated=False, head_rank=0, embed_rank=0)).fold()
    assert folded.config.tie_word_embeddings is True
    assert not folded.model.layers[0].mlp.down_proj.weight[:, 40:].any()
    with torch.no_grad():
        torch.testing.assert_close(
            folded(input_ids=ids).logits, make_model()(input_ids=ids).logits, atol=2e-6, rtol=1e-5
        )


def test_full_folds_into_itself_with_a_tied_head_still_tied(make_model, ids):
    draft = AdaptedDraft(make_model(), ScopeConfig(scope="full"))
    randomise(draft)
    folded = draft.fold()
    with torch.no_grad():
        assert torch.equal(folded(input_ids=ids).logits, draft.model(input_ids=ids).logits)
    assert folded.lm_head.weight is folded.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ScopeConfig(head_rank=0), "gated: false"),
        (ScopeConfig(gated=False), "head_bias: false"),
    ],
)
def test_what_no_dense_model_computes_is_not_folded(make_model, config, message):
    with pytest.raises(ConfigError, match=message):
        AdaptedDraft(make_model(), config).fold()


def test_an_ffn_that_computes_more_than_its_layers_is_refused(make_model):
    """An architecture that scales inside its FFN would be folded and fused into another function, silently."""
    model = make_model()
    mlp = model.model.layers[0].mlp
    plain = type(mlp).forward
    mlp.forward = lambda x: 0.5 * plain(mlp, x)
    with pytest.raises(ConfigError, match=r"model\.layers\.0\.mlp \(LlamaMLP\) computes more than its layers"):
        AdaptedDraft(model)
