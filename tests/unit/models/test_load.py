"""Loading, identity of weights, and vocabulary checks."""

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from adaptd.errors import ConfigError, VocabularyMismatch
from adaptd.models.load import (
    check_same_vocabulary,
    load_causal_lm,
    load_draft,
    load_tokenizer,
    resolve,
    tokenizer_hash,
    vocab_size,
    weights_id,
)


def tokenizer(words):
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token=words[0])


WORDS = [f"w{i}" for i in range(48)]


@pytest.fixture
def folder(make_model, tmp_path):
    """A draft in float16 on disk, with its tokenizer."""
    model = make_model()
    model.half().save_pretrained(tmp_path)
    tokenizer(WORDS).save_pretrained(tmp_path)
    return tmp_path


def test_a_float16_folder_loads_in_any_precision_frozen_and_in_eval_mode(folder, make_model, ids):
    expected = make_model().half().float()
    for dtype in ("float32", "bfloat16", "float16", "auto"):
        model = load_causal_lm(folder, dtype=dtype, device="cpu")
        wanted = torch.float16 if dtype == "auto" else getattr(torch, dtype)
        assert {p.dtype for p in model.parameters()} == {wanted}
        assert model.dtype == wanted
        assert not model.training
        assert not any(p.requires_grad for p in model.parameters())
    exact = load_causal_lm(folder, dtype="float32", device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(exact(input_ids=ids).logits, expected(input_ids=ids).logits, atol=1e-2, rtol=1e-2)
    assert torch.equal(exact.lm_head.weight, expected.lm_head.weight)
    assert exact.lm_head.weight is exact.model.embed_tokens.weight


def test_rotary_frequencies_stay_in_float32(folder):
    """Rounded to bfloat16 they shift every position; `Module.to(dtype)` does it without a word."""
    model = load_causal_lm(folder, dtype="bfloat16", device="cpu")
    reference = load_causal_lm(folder, dtype="float32", device="cpu")
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(model.model.rotary_emb.inv_freq, reference.model.rotary_emb.inv_freq)


def test_the_base_id_does_not_depend_on_the_precision_it_runs_in(folder):
    float32, bfloat16 = (load_draft(folder, dtype=dtype, device="cpu") for dtype in ("float32", "bfloat16"))
    assert float32.base_id == bfloat16.base_id
    assert weights_id(float32.model) != weights_id(bfloat16.model)


def test_weights_id_is_of_a_module_or_its_state_and_changes_with_one_value(make_model):
    model = make_model()
    before = weights_id(model)
    assert before == weights_id(model.state_dict()) == weights_id(make_model())
    model.model.norm.weight.data[3] += 1e-6
    assert weights_id(model) != before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "int8", "device": "cpu"}, r"dtype \('int8'\) must be one of float32, bfloat16, float16 or auto"),
        ({"dtype": "float32", "device": "tpu?"}, r"device \('tpu\?'\)"),
    ],
)
def test_a_bad_dtype_or_device_is_named(folder, settings, message):
    with pytest.raises(ConfigError, match=message):
        load_causal_lm(folder, **settings)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has CUDA")
def test_cuda_on_a_machine_without_it_names_the_remedy(folder):
    with pytest.raises(ConfigError, match="use cpu or auto"):
        load_causal_lm(folder, dtype="auto", device="cuda")


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(ConfigError, match=f"no causal language model could be loaded from '{tmp_path}'"):
        load_causal_lm(tmp_path, dtype="auto", device="cpu")
    with pytest.raises(ConfigError, match=f"no tokenizer could be loaded from '{tmp_path}'"):
        load_tokenizer(tmp_path)


def test_resolve_knows_folders_names_and_missing_paths(tmp_path):
    assert resolve(str(tmp_path), "target") == str(tmp_path)
    assert resolve("Qwen/Qwen3-0.6B", "draft") == "Qwen/Qwen3-0.6B"
    with pytest.raises(ConfigError, match=r"draft model '\./nowhere' is no folder"):
        resolve("./nowhere", "draft")


def test_resolve_pocket_gives_the_shipped_folder_of_the_role_or_says_how_to_build_it(tmp_path, monkeypatch):
    monkeypatch.setattr("adaptd.models.load.files", lambda package: tmp_path)
    with pytest.raises(ConfigError, match=r"adaptd\.pocket\.build"):
        resolve("pocket", "draft")
    (tmp_path / "draft").mkdir()
    (tmp_path / "draft" / "config.json").write_text("{}")
    assert resolve("pocket", "draft") == str(tmp_path / "draft")


def test_one_vocabulary_passes(make_model):
    check_same_vocabulary(make_model(), make_model(seed=1), tokenizer(WORDS), tokenizer(WORDS))


def test_the_same_size_with_another_token_names_the_first_that_differs(make_model):
    other = [*WORDS[:20], "x20", "x21", *WORDS[22:]]
    with pytest.raises(VocabularyMismatch, match=r"token 20 is 'w20' to the target and 'x20' to the draft"):
        check_same_vocabulary(make_model(), make_model(), tokenizer(WORDS), tokenizer(other))


def test_a_token_that_only_one_side_has_is_named(make_model):
    with pytest.raises(VocabularyMismatch, match=r"token 47 is 'w47' to the target and None to the draft \(48 and 47"):
        check_same_vocabulary(make_model(), make_model(), tokenizer(WORDS), tokenizer(WORDS[:47]))


def test_another_number_of_logits_names_both_numbers(make_model):
    padded = make_model()
    padded.resize_token_embeddings(64)
    assert vocab_size(padded) == 64
    with pytest.raises(VocabularyMismatch, match=r"the target has 48 logits and the draft 64"):
        check_same_vocabulary(make_model(), padded, tokenizer(WORDS), tokenizer(WORDS))


def test_a_token_beyond_the_logits_is_refused(make_model):
    more = tokenizer([*WORDS, "w48"])
    with pytest.raises(VocabularyMismatch, match="know token 48, the models have 48 logits"):
        check_same_vocabulary(make_model(), make_model(), more, more)


def test_the_tokenizer_hash_survives_a_folder_and_sees_one_token(folder):
    assert tokenizer_hash(load_tokenizer(folder)) == tokenizer_hash(tokenizer(WORDS))
    assert tokenizer_hash(tokenizer([*WORDS[:47], "other"])) != tokenizer_hash(tokenizer(WORDS))
