"""The model card of the pocket family, written from measurements on held-out prompts."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from adaptd.pocket import generate, text
from adaptd.pocket.data import DOMAINS, Exchange

_PROMPTS_PER_DOMAIN = 100
_K = 4
_TUNED_PROMPTS = 40

_TEMPLATE = """# The pocket family

A tokenizer, a target and a draft, small enough to ship with adaptd, so that the whole product runs and is tested offline.
They are for demonstration and tests; their answers are plausible text, not knowledge. **Never act on a medical answer.**

| part | architecture | parameters | files |
|---|---|---|---|
| tokenizer | byte-level BPE, digits split, chat template | {vocab:,} tokens | in both folders |
| target | Llama, {t_layers} layers, hidden {t_hidden}, tied embeddings | {t_params:,} | `target/`, float16 |
| draft | Llama, {d_layers} layers, hidden {d_hidden}, tied embeddings | {d_params:,} | `draft/`, float16 |
| prompts | held-out requests, at most {prompts} per domain | | `prompts/<domain>.jsonl.gz` |

## Measured on held-out prompts ({n} per domain, seed {seed})

| domain | target perplexity | MAL of the draft (k = {k}, greedy) | looping answers at temperature 0.8 | looping answers, greedy |
|---|---|---|---|---|
{rows}

- *MAL* is the mean acceptance length, emitted tokens per verification round, bonus token included; a draft that is never
  right has 1, one that is always right {kplus}. The draft was distilled from the target's own answers to medical prompts
  only: it is the generic draft that met other traffic. MAL on `medical` is {ratio:.2f} times that on `math`.
- *Looping*: a 4-gram of tokens stands more than 8 times in one answer of at most 96 tokens. So small a target loops when
  decoded greedily; sample it (0.7 to 0.8).

## Training

`python -m adaptd.pocket.build --data DIR --work DIR --out adaptd/pocket` (seed {seed}, {steps} target steps of 6,144 tokens, two
CPU cores). The target sees all four domains; answers are cut at 288 tokens in all and prompts longer than 224 tokens are left
out; function lists keep the called functions and one more, arguments by name and type. The draft minimises KL(p || q) + TV on
answers that the target itself sampled (temperature 0.8) to medical training prompts.{note}

## Data and licences

| domain | source | licence |
|---|---|---|
| medical | MedQuAD (Ben Abacha and Demner-Fushman, BMC Bioinformatics 2019) | CC BY 4.0 |
| math | GSM8K (OpenAI); AQuA-RAT (Google DeepMind) | MIT; Apache-2.0 |
| tools | BFCL and APIBench (Gorilla, UC Berkeley); Glaive function calling v2 sample | Apache-2.0 |
| code | Python 3.11 standard library, functions with their docstrings | PSF-2.0 |

The texts were shortened and re-rendered as described. The weights and prompts are offered under the licence of adaptd
(Apache-2.0) with these attributions; prompts keep the licence of their source.
"""

_TUNED_HEADING = "## The math-tuned target"
_TUNED = """{heading}

`target_math/` is a LoRA of the target (rank {rank} on every linear layer but the head; bfloat16, the format of peft),
trained on the family's math text alone: a target that was fine-tuned after its draft was made. `pocket-math` names the
target with the deltas merged, in `target.model` and in the phases of a benchmark stream.

| domain | KL(tuned, base), nats a token | perplexity of the base | of the tuned target |
|---|---|---|---|
{rows}

Measured on the reference answers of {n} held-out exchanges per domain. `python -m adaptd.pocket.tune --data DIR --out
adaptd/pocket` (seed {seed}, {steps} steps of {batch_tokens:,} tokens, one CPU core). Data: the train parts of GSM8K (MIT) and
AQuA-RAT (Apache-2.0), which the target had too.
"""


def measure(
    target: LlamaForCausalLM,
    draft: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    held_out: dict[str, list[Exchange]],
    seed: int,
) -> dict[str, dict[str, float]]:
    """The card's figures, by domain."""
    pad = tokenizer.pad_token_id
    figures: dict[str, dict[str, float]] = {}
    for domain in DOMAINS:
        exchanges = held_out[domain][:_PROMPTS_PER_DOMAIN]
        prompts = [e.prompt for e in exchanges]
        greedy = generate.answer(target, tokenizer, prompts, domain, temperature=0, max_new_tokens=96, seed=seed)
        sampled = generate.answer(target, tokenizer, prompts, domain, temperature=0.8, max_new_tokens=96, seed=seed)
        references = text.encode(tokenizer, exchanges, text.CONTEXT, 288)
        figures[domain] = {
            "perplexity": generate.perplexity(target, references, pad),
            "mal_greedy": generate.greedy_acceptance(draft, greedy, _K, pad),
            "looping_sampled": generate.looping_share(sampled),
            "looping_greedy": generate.looping_share(greedy),
        }
        print(domain, figures[domain], flush=True)
    return figures


def write(
    target: LlamaForCausalLM,
    draft: LlamaForCausalLM,
    figures: dict[str, dict[str, float]],
    out: Path,
    *,
    prompts: int,
    steps: int,
    seed: int,
    note: str = "",
) -> None:
    """Write `MODEL_CARD.md` and `figures.json` into `out`; `note` says what these figures do not."""
    rows = "\n".join(
        f"| {d} | {f['perplexity']:.1f} | {f['mal_greedy']:.2f} | {f['looping_sampled']:.1%} | {f['looping_greedy']:.1%} |"
        for d, f in figures.items()
    )
    card = _TEMPLATE.format(
        vocab=target.config.vocab_size,
        t_layers=target.config.num_hidden_layers,
        t_hidden=target.config.hidden_size,
        t_params=sum(p.numel() for p in target.parameters()),
        d_layers=draft.config.num_hidden_layers,
        d_hidden=draft.config.hidden_size,
        d_params=sum(p.numel() for p in draft.parameters()),
        prompts=prompts,
        n=_PROMPTS_PER_DOMAIN,
        seed=seed,
        k=_K,
        kplus=_K + 1,
        rows=rows,
        ratio=figures["medical"]["mal_greedy"] / figures["math"]["mal_greedy"],
        steps=steps,
        note=f"\n\n{note}" if note else "",
    )
    (out / "MODEL_CARD.md").write_text(card, encoding="utf-8")
    (out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def measure_tuned(
    tuned: LlamaForCausalLM,
    base: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    held_out: dict[str, list[Exchange]],
) -> dict[str, dict[str, float]]:
    """What tuning changed, by domain."""
    figures: dict[str, dict[str, float]] = {}
    for domain in DOMAINS:
        references = text.encode(tokenizer, held_out[domain][:_TUNED_PROMPTS], text.CONTEXT, 288)
        figures[domain] = generate.compare(tuned, base, references, tokenizer.pad_token_id)._asdict()
        print(domain, figures[domain], flush=True)
    return figures


def write_tuned(
    figures: dict[str, dict[str, float]], out: Path, *, rank: int, steps: int, batch_tokens: int, seed: int
) -> None:
    """Put the section on the tuned target at the end of `MODEL_CARD.md` and its figures in `figures_math.json`."""
    rows = "\n".join(
        f"| {d} | {f['kl']:.3f} | {f['perplexity_base']:.1f} | {f['perplexity_tuned']:.1f} |"
        for d, f in figures.items()
    )
    section = _TUNED.format(
        heading=_TUNED_HEADING,
        rank=rank,
        rows=rows,
        n=_TUNED_PROMPTS,
        seed=seed,
        steps=steps,
        batch_tokens=batch_tokens,
    )
    path = out / "MODEL_CARD.md"
    before = path.read_text(encoding="utf-8").split(_TUNED_HEADING)[0].rstrip()
    path.write_text(f"{before}\n\n{section}", encoding="utf-8")
    (out / "figures_math.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
