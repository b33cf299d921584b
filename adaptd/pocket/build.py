"""Make the pocket family: `python -m adaptd.pocket.build --data DIR --work DIR --out adaptd/pocket`.

Stages, each skipped when its output is there: tokenizer, target, answers of the target on medical prompts, draft
distilled from those answers, request prompts, model card. A stage that is interrupted resumes at its last save.
"""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from adaptd.pocket import card, data, generate, text, train
from adaptd.pocket.text import Encoded

TARGET = LlamaConfig(
    vocab_size=text.VOCAB_SIZE,
    hidden_size=384,
    intermediate_size=1152,
    num_hidden_layers=4,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=text.CONTEXT,
    tie_word_embeddings=True,
)
DRAFT = LlamaConfig(
    vocab_size=text.VOCAB_SIZE,
    hidden_size=192,
    intermediate_size=352,
    num_hidden_layers=2,
    num_attention_heads=3,
    num_key_value_heads=3,
    max_position_embeddings=text.CONTEXT,
    tie_word_embeddings=True,
)
MAX_PROMPT, MAX_TOKENS = 224, 288
PROMPTS_PER_DOMAIN = 400
ANSWER_TOKENS = 96
TEMPERATURE = 0.8


def with_special_ids(config: LlamaConfig, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """The configuration with the tokenizer's special token ids filled in."""
    config.bos_token_id = tokenizer.bos_token_id
    config.eos_token_id = tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    return config


def build_target(args: argparse.Namespace) -> None:
    """Tokenizer and target, from all four domains."""
    exchanges = data.load_exchanges(args.data, "train", args.seed)
    folder = args.work / "tokenizer"
    if not (folder / "tokenizer.json").is_file():
        text.train_tokenizer((t for e in exchanges for t in (e.prompt, e.response)), folder)
    tokenizer = text.load_tokenizer(folder)
    items = text.encode(tokenizer, exchanges, MAX_PROMPT, MAX_TOKENS)
    torch.manual_seed(args.seed)
    model = LlamaForCausalLM(with_special_ids(TARGET, tokenizer)).float()
    print(f"target: {sum(p.numel() for p in model.parameters()):,} parameters, {len(items):,} exchanges", flush=True)
    train.fit(
        model,
        items,
        lambda batch: train.target_loss(model, batch, tokenizer.pad_token_id),
        args.work / "target-state",
        steps=args.target_steps,
        batch_tokens=6144,
        muon_lr=0.02,
        adam_lr=0.004,
        seed=args.seed,
    )
    model.half().save_pretrained(args.work / "target")
    tokenizer.save_pretrained(args.work / "target")


def load(folder: Path) -> LlamaForCausalLM:
    """A saved model in float32, ready to evaluate."""
    model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.eval().requires_grad_(False)
    return model


def build_answers(args: argparse.Namespace) -> list[Encoded]:
    """The target's own answers to medical training prompts, kept in `answers.json`."""
    path = args.work / "answers.json"
    if path.is_file():
        return [Encoded(*row) for row in json.loads(path.read_text())]
    exchanges = [e for e in data.load_exchanges(args.data, "train", args.seed) if e.domain == "medical"]
    prompts = [e.prompt for e in exchanges][: args.answers]
    tokenizer = text.load_tokenizer(args.work / "target")
    answers = generate.answer(
        load(args.work / "target"),
        tokenizer,
        prompts,
        "medical",
        temperature=TEMPERATURE,
        max_new_tokens=ANSWER_TOKENS,
        seed=args.seed,
    )
    path.write_text(json.dumps(answers))
    print(f"answers: {len(answers):,}, {sum(len(a.ids) - a.prompt_len for a in answers):,} tokens", flush=True)
    return answers


def build_draft(args: argparse.Namespace, answers: list[Encoded]) -> None:
    """The draft, distilled from the target on `answers` only."""
    tokenizer = text.load_tokenizer(args.work / "target")
    target = load(args.work / "target")
    torch.manual_seed(args.seed + 1)
    draft = LlamaForCausalLM(with_special_ids(DRAFT, tokenizer)).float()
    print(f"draft: {sum(p.numel() for p in draft.parameters()):,} parameters", flush=True)
    train.fit(
        draft,
        answers,
        lambda batch: train.distillation_loss(draft, target, batch, tokenizer.pad_token_id),
        args.work / "draft-state",
        steps=args.draft_steps,
        batch_tokens=4096,
        muon_lr=0.02,
        adam_lr=0.005,
        seed=args.seed,
    )
    draft.half().save_pretrained(args.work / "draft")
    tokenizer.save_pretrained(args.work / "draft")


def held_out_prompts(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> dict[str, list[data.Exchange]]:
    """Up to `PROMPTS_PER_DOMAIN` held-out exchanges a domain whose prompt fits, without repeats."""
    chosen: dict[str, list[data.Exchange]] = {domain: [] for domain in data.DOMAINS}
    seen: set[str] = set()
    for exchange in data.load_exchanges(args.data, "test", args.seed):
        kept = chosen[exchange.domain]
        if len(kept) == PROMPTS_PER_DOMAIN or exchange.prompt in seen:
            continue
        if len(tokenizer(text.render(exchange.prompt))["input_ids"]) <= MAX_PROMPT:
            seen.add(exchange.prompt)
            kept.append(exchange)
    return chosen


def ship(args: argparse.Namespace) -> None:
    """Copy models and prompts to `--out` and write the model card from measurements."""
    for name in ("target", "draft"):
        shutil.copytree(args.work / name, args.out / name, dirs_exist_ok=True)
    tokenizer = text.load_tokenizer(args.out / "target")
    held_out = held_out_prompts(args, tokenizer)
    folder = args.out / "prompts"
    folder.mkdir(parents=True, exist_ok=True)
    for domain, exchanges in held_out.items():
        lines = "".join(
            json.dumps({"domain": domain, "prompt": e.prompt}, ensure_ascii=False) + "\n" for e in exchanges
        )
        # A zero time stamp keeps the file identical from build to build.
        (folder / f"{domain}.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
    target, draft = load(args.out / "target"), load(args.out / "draft")
    figures = card.measure(target, draft, tokenizer, held_out, args.seed)
    card.write(
        target,
        draft,
        figures,
        args.out,
        prompts=PROMPTS_PER_DOMAIN,
        steps=args.target_steps,
        seed=args.seed,
        note=args.note,
    )


def main() -> None:
    """Parse the command line and run the stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with <source>.<split>.jsonl.gz")
    parser.add_argument("--work", type=Path, required=True, help="folder for intermediate states")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder that gets target/, draft/, prompts/ and the card"
    )
    parser.add_argument("--target-steps", type=int, default=440, help="optimiser steps of 6,144 tokens (default 440)")
    parser.add_argument("--answers", type=int, default=5000, help="medical answers to distil from (default 5000)")
    parser.add_argument("--draft-steps", type=int, default=250, help="optimiser steps of 4,096 tokens (default 250)")
    parser.add_argument("--note", default="", help="a sentence for the model card")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything (default 0)")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if not (args.work / "target" / "model.safetensors").is_file():
        build_target(args)
    answers = build_answers(args)
    if not (args.work / "draft" / "model.safetensors").is_file():
        build_draft(args, answers)
    ship(args)


if __name__ == "__main__":
    main()
