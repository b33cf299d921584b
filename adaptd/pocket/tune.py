"""Make the math-tuned target: `python -m adaptd.pocket.tune --data DIR --out adaptd/pocket`.

A LoRA of the shipped target, trained on the family's math text alone. It is what a deployment does when it replaces its
target by a fine-tuned one: same tokens, other distribution. A few minutes on one core.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from torch import nn
from transformers import LlamaForCausalLM

from adaptd.models.adapter import TrainedAdapter
from adaptd.models.load import load_causal_lm
from adaptd.pocket import build, card, data, text, train
from adaptd.pocket.text import Encoded

FOLDER = "target_math"
RANK = 16
#: Alpha over rank is 2: small matrices reach far in few steps.
ALPHA = 32


def fit(
    model: LlamaForCausalLM,
    adapter: TrainedAdapter,
    items: Sequence[Encoded],
    pad: int,
    *,
    steps: int,
    batch_tokens: int,
    lr: float,
    seed: int,
) -> None:
    """Next-token training of the adapter in `model`, for `steps` batches of `batch_tokens` tokens, padding included."""
    optimiser = torch.optim.AdamW(adapter.parameters(), lr=lr, weight_decay=0.0)
    started, running = time.monotonic(), 0.0
    for step, batch in enumerate(train.stream(items, batch_tokens, seed), start=1):
        if step > steps:
            break
        for group in optimiser.param_groups:
            group["lr"] = lr * train.schedule(step, steps)
        loss = train.target_loss(model, batch, pad)
        loss.backward()
        nn.utils.clip_grad_norm_(adapter.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        running += (loss.item() - running) * max(0.05, 1 / step)
        if step % 10 == 0:
            print(f"step {step}/{steps} loss {running:.3f} seconds {time.monotonic() - started:.0f}", flush=True)


def build_adapter(args: argparse.Namespace) -> None:
    """Train and write `target_math/`."""
    tokenizer = text.load_tokenizer(args.out / "target")
    exchanges = [e for e in data.load_exchanges(args.data, "train", args.seed) if e.domain == "math"]
    items = text.encode(tokenizer, exchanges, build.MAX_PROMPT, build.MAX_TOKENS)
    torch.manual_seed(args.seed)
    model = build.load(args.out / "target")
    adapter = TrainedAdapter(model, RANK, ALPHA)
    size = sum(p.numel() for p in adapter.parameters())
    print(f"adapter: {size:,} parameters, {len(items):,} exchanges", flush=True)
    fit(
        model,
        adapter,
        items,
        tokenizer.pad_token_id,
        steps=args.steps,
        batch_tokens=args.batch_tokens,
        lr=args.lr,
        seed=args.seed,
    )
    adapter.save(args.out / FOLDER, "../target")


def describe(args: argparse.Namespace) -> None:
    """Measure the tuned target beside its base and write the card's section."""
    tokenizer = text.load_tokenizer(args.out / "target")
    base = build.load(args.out / "target")
    tuned = cast(LlamaForCausalLM, load_causal_lm(args.out / FOLDER, dtype="float32", device="cpu"))
    held_out = build.held_out_prompts(args, tokenizer)
    figures = card.measure_tuned(tuned, base, tokenizer, held_out)
    card.write_tuned(figures, args.out, rank=RANK, steps=args.steps, batch_tokens=args.batch_tokens, seed=args.seed)


def main() -> None:
    """Parse the command line, train, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with <source>.<split>.jsonl.gz")
    parser.add_argument("--out", type=Path, required=True, help="folder with target/; gets target_math/")
    parser.add_argument("--steps", type=int, default=192, help="optimiser steps (default 192)")
    parser.add_argument("--batch-tokens", type=int, default=2048, help="tokens a step (default 2048)")
    parser.add_argument("--lr", type=float, default=3e-3, help="learning rate of AdamW (default 3e-3)")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything (default 0)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    build_adapter(args)
    describe(args)


if __name__ == "__main__":
    main()
