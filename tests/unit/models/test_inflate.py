"""An inflated model says what the small one says."""

from pathlib import Path

import pytest
import torch

from adaptd.models.inflate import Shape, inflate, shape_for
from adaptd.models.load import load_causal_lm, resolve
from tests.unit.decoding.tiny import make_model

TOKENS = torch.randint(0, 97, (3, 24), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "shape", [Shape(64, 48, 2, 2), Shape(32, 80, 2, 2), Shape(32, 48, 5, 2), Shape(48, 48, 2, 3), Shape(80, 100, 4, 5)]
)
def test_wider_deeper_or_with_more_heads_the_distribution_stays(shape: Shape, tied: bool, tmp_path: Path) -> None:
    small = make_model("llama", tie_word_embeddings=tied, rms_norm_eps=0.05)
    with torch.no_grad():
        for name, parameter in small.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    large = inflate(small, shape)
    assert sum(p.numel() for p in large.parameters()) == shape.parameters(small.config)
    large.save_pretrained(tmp_path)
    loaded = load_causal_lm(tmp_path, dtype="auto", device="cpu")
    with torch.no_grad():
        before, after = (m(TOKENS).logits.log_softmax(-1) for m in (small, loaded))
    assert before.std() > 1.0
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)


def test_the_added_weights_are_not_idle() -> None:
    """Zeros there would let a sparse or constant-folding kernel skip what is to be paid for."""
    large = inflate(make_model("llama"), Shape(48, 96, 3, 3))
    for name in ("layers.2.self_attn.q_proj", "layers.0.mlp.up_proj", "layers.2.mlp.gate_proj"):
        assert (large.model.get_submodule(name).weight == 0).sum() == 0


@pytest.mark.parametrize("parameters", [2e7, 2e8, 8e9])
def test_the_pocket_target_reaches_the_size_that_is_asked_for(parameters: float) -> None:
    config = load_causal_lm(resolve("pocket", "target"), dtype="auto", device="meta").config
    found = shape_for(config, round(parameters)).parameters(config)
    assert found == pytest.approx(parameters, rel=0.1)


def test_what_cannot_be_inflated_is_refused() -> None:
    small = make_model("llama")
    with pytest.raises(ValueError, match="must be at least"):
        inflate(small, Shape(16, 48, 2, 2))
    with pytest.raises(ValueError, match="those the model has"):
        shape_for(small.config, 10)
    with pytest.raises(ValueError, match="only a Llama"):
        inflate(make_model("qwen3"), Shape(64, 96, 3, 3))
