"""The shipped family keeps its promises: size, loading, mismatch, variety."""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from adaptd.models import load
from adaptd.models.chat import render_chat
from adaptd.pocket import generate, text
from adaptd.pocket.text import Encoded

FOLDER = Path(str(files("adaptd.pocket")))
MAX_BYTES = 24 * 2**20


def test_everything_that_ships_fits_the_limit() -> None:
    shipped = [
        p for name in ("target", "target_math", "draft", "prompts") for p in (FOLDER / name).rglob("*") if p.is_file()
    ]
    assert 0 < sum(p.stat().st_size for p in shipped) <= MAX_BYTES


def test_plain_hugging_face_directories_load_in_float16(pocket_target: Any) -> None:
    for name, most in (("target", 9_500_000), ("draft", 1_500_000)):
        model = LlamaForCausalLM.from_pretrained(FOLDER / name)
        assert next(model.parameters()).dtype == torch.float16
        assert sum(p.numel() for p in model.parameters()) <= most


def test_the_pair_shares_one_vocabulary(pocket_target: Any, pocket_draft: Any, pocket_tokenizer: Any) -> None:
    load.check_same_vocabulary(
        pocket_target, pocket_draft, pocket_tokenizer, load.load_tokenizer(load.resolve("pocket", "draft"))
    )


def test_the_template_renders_what_the_models_were_trained_on(pocket_tokenizer: Any) -> None:
    ids = render_chat(pocket_tokenizer, [{"role": "user", "content": "2 + 2?"}])
    assert pocket_tokenizer.decode(ids) == text.render("2 + 2?")


def test_the_draft_is_visibly_mismatched(pocket_target: Any, pocket_draft: Any, pocket_prompts: Any) -> None:
    """MAL on medical at least 1.25 times that on math (k = 4, greedy), on 40 held-out prompts each."""
    mal = {}
    for domain in ("medical", "math"):
        prompts = pocket_prompts[domain][:40]
        width = max(map(len, prompts))
        padded = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        out = pocket_target.generate(
            padded, attention_mask=padded.ne(0).long(), max_new_tokens=64, do_sample=False, pad_token_id=0
        )
        answers = [
            Encoded([t for t in row.tolist() if t != 0], len(prompt), domain)
            for prompt, row in zip(prompts, out, strict=True)
        ]
        mal[domain] = generate.greedy_acceptance(pocket_draft, answers, 4, pad=0)
    assert mal["medical"] >= 1.25 * mal["math"], mal


def test_the_card_states_what_was_measured() -> None:
    figures = json.loads((FOLDER / "figures.json").read_text())
    card = (FOLDER / "MODEL_CARD.md").read_text()
    assert set(figures) == {"medical", "math", "tools", "code"}
    for domain, f in figures.items():
        assert f"| {domain} | {f['perplexity']:.1f} | {f['mal_greedy']:.2f} |" in card
        assert f["looping_sampled"] <= 0.05
    assert figures["medical"]["mal_greedy"] >= 1.25 * figures["math"]["mal_greedy"]


def test_the_card_states_what_tuning_changed() -> None:
    figures = json.loads((FOLDER / "figures_math.json").read_text())
    card = (FOLDER / "MODEL_CARD.md").read_text()
    assert set(figures) == {"medical", "math", "tools", "code"}
    for domain, f in figures.items():
        assert f"| {domain} | {f['kl']:.3f} | {f['perplexity_base']:.1f} | {f['perplexity_tuned']:.1f} |" in card
    assert figures["math"]["perplexity_tuned"] < figures["math"]["perplexity_base"], "tuned on math"


@pytest.mark.parametrize("domain", ["medical", "math", "tools", "code"])
def test_a_few_hundred_prompts_a_domain_fit_the_demonstrations_context(domain: str, pocket_prompts: Any) -> None:
    prompts = pocket_prompts[domain]
    assert len(prompts) >= 200
    assert len({tuple(p) for p in prompts}) == len(prompts)
    assert max(map(len, prompts)) <= 224
