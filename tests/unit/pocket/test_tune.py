"""The math-tuned target: how it is trained and described, and what ships."""

from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from adaptd.models.adapter import TrainedAdapter
from adaptd.models.load import load_causal_lm, resolve
from adaptd.pocket import card, generate, tune
from adaptd.pocket.text import Encoded
from adaptd.pocket.train import target_loss

FOLDER = Path(str(files("adaptd.pocket")))
FIGURES = {"math": {"kl": 0.25, "perplexity_base": 14.0, "perplexity_tuned": 9.0}}


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config)


def counting(n: int) -> list[Encoded]:
    """Sequences in which each token is the one before plus one."""
    return [Encoded([(start + i) % 31 + 1 for i in range(12)], 2, "math") for start in range(n)]


def test_only_the_adapter_learns_and_its_loss_falls() -> None:
    model = tiny()
    before = {n: p.clone() for n, p in model.named_parameters()}
    adapter = TrainedAdapter(model, rank=4, alpha=8)
    items = counting(16)
    first = target_loss(model, items, 0).item()
    tune.fit(model, adapter, items, 0, steps=30, batch_tokens=96, lr=1e-2, seed=0)
    assert target_loss(model, items, 0).item() < 0.8 * first
    after = dict(model.named_parameters())
    kept = [n for n in after if "lora_" not in n]
    assert len(kept) == len(before)
    assert all(torch.equal(after[n], before[n.replace(".base_layer", "")]) for n in kept)


def test_divergence_is_none_from_itself_and_positive_from_another() -> None:
    model, other = tiny().eval(), tiny().eval()
    items = counting(5)
    same = generate.compare(model, other, items, 0)
    assert same.kl == pytest.approx(0, abs=1e-6)
    assert same.perplexity_base == same.perplexity_tuned == pytest.approx(generate.perplexity(model, items, 0))
    with torch.no_grad():
        other.lm_head.weight.add_(torch.randn(32, 16, generator=torch.Generator().manual_seed(1)))
    found = generate.compare(model, other, items, 0)
    assert found.kl > 0.01
    assert found.perplexity_base == pytest.approx(generate.perplexity(other, items, 0))
    assert found.perplexity_tuned == same.perplexity_tuned


def test_the_cards_section_is_replaced_and_stays_the_last(tmp_path: Path) -> None:
    (tmp_path / "MODEL_CARD.md").write_text("# The pocket family\n\nText.\n")
    settings = {"rank": 16, "steps": 3, "batch_tokens": 2048, "seed": 0}
    card.write_tuned(FIGURES, tmp_path, **settings)
    once = (tmp_path / "MODEL_CARD.md").read_text()
    card.write_tuned(FIGURES, tmp_path, **settings)
    assert (tmp_path / "MODEL_CARD.md").read_text() == once
    assert once.startswith("# The pocket family\n\nText.\n\n## The math-tuned target\n")
    assert "| math | 0.250 | 14.0 | 9.0 |" in once


def test_what_ships_is_small_and_is_another_distribution_over_the_same_tokens() -> None:
    assert sum(p.stat().st_size for p in (FOLDER / tune.FOLDER).iterdir()) < 2 * 2**20
    base, tuned = (load(name) for name in ("pocket", "pocket-math"))
    assert set(base.state_dict()) == set(tuned.state_dict())
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        p, q = (m(input_ids=ids).logits.log_softmax(-1) for m in (tuned, base))
    assert (p.exp() * (p - q)).sum(-1).mean() > 0.02


def load(name: str) -> Any:
    return load_causal_lm(resolve(name, "target"), dtype="float32", device="cpu")
