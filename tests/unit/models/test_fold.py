"""A version as a plain model: exact, whole, and only what may travel travels."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from adaptd.errors import ConfigError
from adaptd.models.fold import check_publishable, fold, moving, moving_tensors, untie, write_folder
from adaptd.models.scope import AdaptedDraft, ScopeConfig
from checkpoints.errors import StoreUnavailable

KINDS = ["llama", "llama_untied_biased", "qwen3", "gpt2"]
PLAIN = ScopeConfig(width=12, gated=False, head_rank=0, embed_rank=0)


def learned(draft: AdaptedDraft) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in draft.state().items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "config",
    [
        PLAIN,
        ScopeConfig(scope="lora", lora_rank=4),
        ScopeConfig(width=12, gated=False, head_rank=4, embed_rank=4, head_bias=False),
    ],
    ids=["expert", "lora", "head and embedding"],
)
def test_the_folded_model_computes_what_the_adapted_draft_computes(make_model, ids, kind, config):
    draft = AdaptedDraft(make_model(kind), config)
    folded = fold(draft, learned(draft))
    with torch.no_grad():
        expected = draft.model(input_ids=ids).logits
        torch.testing.assert_close(folded(input_ids=ids).logits, expected, atol=1e-4, rtol=1e-4)
        base = make_model(kind)(input_ids=ids).logits
    assert (expected - base).abs().max() > 0.01, "or the comparison could not fail"


@pytest.mark.parametrize("kind", KINDS)
def test_the_prepared_draft_is_the_base_with_two_tensors_for_embedding_and_head(make_model, ids, kind, tmp_path):
    draft = AdaptedDraft(make_model(kind), PLAIN)
    base = tmp_path / "base"
    make_model(kind).save_pretrained(base)
    (base / "tokenizer.json").write_text("{}")
    write_folder(tmp_path / "out", draft, {}, str(base), {"version": 0}, untied=True)
    prepared = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(prepared) is type(make_model(kind))
    assert not prepared.config.tie_word_embeddings
    head, embedding = prepared.get_output_embeddings().weight, prepared.get_input_embeddings().weight
    assert head.data_ptr() != embedding.data_ptr()
    with torch.no_grad():
        torch.testing.assert_close(prepared(input_ids=ids).logits, make_model(kind)(input_ids=ids).logits)
    assert json.loads((tmp_path / "out" / "adaptd.json").read_text()) == {"version": 0}
    assert (tmp_path / "out" / "tokenizer.json").is_file()


@pytest.mark.parametrize("kind", KINDS)
def test_what_travels_turns_the_prepared_draft_into_the_version_and_back(make_model, ids, kind):
    """A tensor left out of what travels would keep the value of another version."""
    draft = AdaptedDraft(make_model(kind), PLAIN)
    tensors = learned(draft)
    engine = fold(draft, {}, untied=True)
    sent = moving_tensors(draft, tensors)
    assert not [name for name in sent if "embed" in name or "lm_head" in name or "wte" in name or "norm" in name]
    with torch.no_grad():
        for update in (sent, moving_tensors(draft, {}), sent):
            engine.load_state_dict(update, strict=False)
            version = tensors if update is sent else {}
            expected = fold(draft, version)(input_ids=ids).logits
            torch.testing.assert_close(engine(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)


def test_every_tensor_of_a_touched_module_moves_and_no_other(make_model):
    model = make_model("llama_untied_biased")
    draft = AdaptedDraft(model, ScopeConfig(scope="lora", lora_rank=2, lora_targets=["layers.1.self_attn.q_proj"]))
    names = fold(draft, {}).state_dict()
    prefix = "model.layers.1.self_attn.q_proj"
    assert moving(draft, names) == [f"{prefix}.bias", f"{prefix}.weight"]


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        (ScopeConfig(), ["adapt.gated: false", "adapt.head_rank: 0", "adapt.embed_rank: 0"]),
        (ScopeConfig(gated=False, embed_rank=0), ["adapt.head_rank: 0"]),
        (ScopeConfig(scope="full"), ["adapt.scope: private_expert or lora"]),
    ],
)
def test_a_scope_that_cannot_travel_names_every_setting_to_change(config, settings):
    with pytest.raises(ConfigError) as error:
        check_publishable(config)
    assert all(setting in str(error.value) for setting in settings)


def test_untying_an_untied_model_changes_nothing(make_model):
    model = make_model("llama_untied_biased")
    before = model.lm_head.weight.clone()
    untie(model)
    assert torch.equal(model.lm_head.weight, before)


def test_a_folder_that_holds_something_is_not_written_over(make_model, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    draft = AdaptedDraft(make_model(), PLAIN)
    with pytest.raises(StoreUnavailable, match="not an empty folder"):
        write_folder(tmp_path / "out", draft, {}, "unused", {}, untied=False)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_failed_export_leaves_nothing_behind(make_model, tmp_path):
    gated = AdaptedDraft(make_model(), ScopeConfig(width=4, head_rank=0, embed_rank=0))
    with pytest.raises(ConfigError, match="gated: false"):
        write_folder(tmp_path / "out", gated, {}, "unused", {}, untied=False)
    assert not list(tmp_path.iterdir())
