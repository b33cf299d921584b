"""A target that is a LoRA adapter: merged when loaded, never unpickled, its base found beside it."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from adaptd.errors import ConfigError
from adaptd.models.adapter import TrainedAdapter, base_of, is_adapter
from adaptd.models.load import load_causal_lm, load_tokenizer, model_limits, resolve


@pytest.fixture
def folder(make_model, tmp_path):
    """`base/` and beside it `tuned/`, an adapter with random deltas."""
    make_model().save_pretrained(tmp_path / "base")
    core = Tokenizer(models.WordLevel({f"w{i}": i for i in range(48)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="w0").save_pretrained(tmp_path / "base")
    adapter = TrainedAdapter(make_model(), rank=2, alpha=4)
    generator = torch.Generator().manual_seed(0)
    for parameter in adapter.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    adapter.save(tmp_path / "tuned", "../base")
    return tmp_path


def load(path):
    return load_causal_lm(path, dtype="float32", device="cpu")


# peft 0.21 reads a name that transformers 5.23 deprecates.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_loads_as_its_base_with_the_deltas_merged(folder, ids):
    base, tuned = load(folder / "base"), load(folder / "tuned")
    assert set(tuned.state_dict()) == set(base.state_dict()), "a plain model: nothing of peft is left in it"
    with torch.no_grad():
        found = tuned(input_ids=ids).logits
        unmerged = PeftModel.from_pretrained(load(folder / "base"), str(folder / "tuned"))
        torch.testing.assert_close(found, unmerged(input_ids=ids).logits, atol=1e-4, rtol=1e-4)
        assert (found - base(input_ids=ids).logits).abs().max() > 0.1
    assert not any(p.requires_grad for p in tuned.parameters())


def test_what_is_saved_is_small_bfloat16_safetensors_alone(folder):
    assert sorted(p.name for p in (folder / "tuned").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    from safetensors.torch import load_file

    assert {t.dtype for t in load_file(folder / "tuned" / "adapter_model.safetensors").values()} == {torch.bfloat16}


def test_tokenizer_and_limits_are_the_bases(folder):
    assert len(load_tokenizer(folder / "tuned")) == 48
    assert model_limits(folder / "tuned") == model_limits(folder / "base")


def test_the_base_is_a_folder_beside_or_a_name(folder):
    assert base_of(folder / "tuned") == str((folder / "base").resolve())
    assert base_of(folder / "base") == str(folder / "base")
    config = folder / "tuned" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "org/name"}))
    assert base_of(folder / "tuned") == "org/name"


def test_a_whole_model_with_an_adapters_file_beside_it_is_a_whole_model(folder):
    shutil.copy(folder / "tuned" / "adapter_config.json", folder / "base")
    assert not is_adapter(folder / "base")


@pytest.mark.parametrize("content", ["{}", "[1]", "{", '{"base_model_name_or_path": null}'])
def test_an_adapter_that_names_no_base_is_refused(folder, content):
    (folder / "tuned" / "adapter_config.json").write_text(content)
    with pytest.raises(ConfigError, match="base_model_name_or_path"):
        load(folder / "tuned")


def test_pickled_weights_are_never_read(folder):
    weights = folder / "tuned" / "adapter_model.safetensors"
    weights.rename(weights.with_name("adapter_model.bin"))
    with pytest.raises(ConfigError, match=r"has no adapter_model\.safetensors"):
        load(folder / "tuned")


@pytest.mark.parametrize("other", [{"layers": 1}, {"layers": 3}, {"kind": "gpt2"}], ids=str)
def test_an_adapter_that_does_not_fit_is_refused_whole(folder, make_model, other):
    """peft would merge what fits and say nothing."""
    shutil.rmtree(folder / "base")
    make_model(**other).save_pretrained(folder / "base")
    config = folder / "tuned" / "adapter_config.json"
    # By their last names, as peft writes them for a deeper model: each layer has one.
    config.write_text(json.dumps(json.loads(config.read_text()) | {"target_modules": ["q_proj", "down_proj"]}))
    with pytest.raises(ConfigError, match=r"the adapter in .*tuned does not fit its base '.*base'"):
        load(folder / "tuned")


def test_the_tuned_target_is_found_by_name_and_only_as_a_target(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="draft model 'pocket-math' is a target: use `pocket`"):
        resolve("pocket-math", "draft")
    monkeypatch.setattr("adaptd.models.load.files", lambda package: tmp_path)
    with pytest.raises(ConfigError, match=r"adaptd\.pocket\.tune"):
        resolve("pocket-math", "target")
