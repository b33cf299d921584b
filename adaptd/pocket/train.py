"""Training loops of the pocket family: the target by next-token prediction, the draft by distillation from it.

Both run on two CPU cores at low priority, save every few minutes and resume at the saved step with the same batches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaForCausalLM

from adaptd.pocket.text import Encoded, batches, collate

#: Weight of prompt tokens in the target's loss: the prompt is text to learn from, but answers are what gets served.
PROMPT_WEIGHT = 0.3
_SAVE_EVERY_S = 120.0


def orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """Nearest semi-orthogonal matrix by the quintic Newton-Schulz iteration of Muon (Jordan et al., 2024).

    In float32: `torch.optim.Muon` computes it in bfloat16, which a CPU without bfloat16 units runs seven times slower.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix / (matrix.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    nearest: Tensor = x.T if tall else x
    return nearest


class MuonAdam:
    """Muon on the hidden matrices, Adam on embeddings and norms; state in plain tensors, so it saves to safetensors."""

    def __init__(self, model: nn.Module, muon_lr: float, adam_lr: float, weight_decay: float) -> None:
        self.parameters = dict(model.named_parameters())
        self.muon_lr, self.adam_lr, self.weight_decay = muon_lr, adam_lr, weight_decay
        self.state: dict[str, Tensor] = {}
        for name, p in self.parameters.items():
            self.state[f"{name}/m"] = torch.zeros_like(p)
            if not self._hidden(name, p):
                self.state[f"{name}/v"] = torch.zeros_like(p)

    @staticmethod
    def _hidden(name: str, p: Tensor) -> bool:
        return p.ndim == 2 and "embed" not in name and "lm_head" not in name

    @torch.no_grad()
    def step(self, step: int, scale: float) -> None:
        """One update with learning rates multiplied by `scale`; `step` counts from 1; clears the gradients."""
        for name, p in self.parameters.items():
            if p.grad is None:
                continue
            m = self.state[f"{name}/m"]
            if self._hidden(name, p):
                m.lerp_(p.grad, 0.05)
                update = orthogonalise(p.grad.lerp(m, 0.95))
                lr = self.muon_lr * scale
                p.mul_(1 - lr * self.weight_decay)
                p.add_(update, alpha=-lr * max(1.0, p.shape[0] / p.shape[1]) ** 0.5)
            else:
                v = self.state[f"{name}/v"]
                m.lerp_(p.grad, 0.1)
                v.lerp_(p.grad.square(), 0.05)
                direction = (m / (1 - 0.9**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-8)
                p.add_(direction, alpha=-self.adam_lr * scale)
            p.grad = None


def schedule(step: int, steps: int, warmup: int = 20, decay: float = 0.5) -> float:
    """Warm-up, constant, then linear decay over the last `decay` of the run."""
    return min(1.0, step / warmup, max(0.0, (steps - step) / (decay * steps)))


def target_loss(model: LlamaForCausalLM, batch: Sequence[Encoded], pad: int) -> Tensor:
    """Weighted next-token cross-entropy of one batch, in nats per (weighted) token."""
    ids, is_token, is_answer = collate(batch, pad)
    weight = (is_token * PROMPT_WEIGHT + is_answer * (1 - PROMPT_WEIGHT))[:, 1:]
    keep = weight > 0
    hidden = model.model(input_ids=ids).last_hidden_state[:, :-1][keep]
    loss = functional.cross_entropy(model.lm_head(hidden), ids[:, 1:][keep], reduction="none")
    mean: Tensor = (loss * weight[keep]).sum() / weight.sum()
    return mean


def distillation_loss(draft: LlamaForCausalLM, target: LlamaForCausalLM, batch: Sequence[Encoded], pad: int) -> Tensor:
    """KL(p || q) + TV(p, q) over the full vocabulary on answer positions, nats per position."""
    ids, _, is_answer = collate(batch, pad)
    keep = is_answer[:, 1:]
    with torch.no_grad():
        p = target.lm_head(target.model(input_ids=ids).last_hidden_state[:, :-1][keep]).log_softmax(-1)
    q = draft.lm_head(draft.model(input_ids=ids).last_hidden_state[:, :-1][keep]).log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    tv = 0.5 * (p.exp() - q.exp()).abs().sum(-1)
    mean: Tensor = (kl + tv).mean()
    return mean


def fit(
    model: LlamaForCausalLM,
    items: Sequence[Encoded],
    loss_of: Callable[[Sequence[Encoded]], Tensor],
    state_dir: Path,
    *,
    steps: int,
    batch_tokens: int,
    muon_lr: float,
    adam_lr: float,
    seed: int,
) -> None:
    """Train `model` in place for `steps` batches, resuming from `state_dir` if it holds a saved state.

    Args:
      model: parameters float32.
      items: training sequences.
      loss_of: batch to scalar loss.
      state_dir: where `state.safetensors` is kept between saves; created if missing.
      steps: optimiser steps in all, resumed ones included.
      batch_tokens: tokens a batch, padding included.
      seed: seed of the batch order.
    """
    state_dir.mkdir(parents=True, exist_ok=True)
    optimiser = MuonAdam(model, muon_lr, adam_lr, weight_decay=0.05)
    first = _resume(model, optimiser, state_dir)
    started = saved = time.monotonic()
    seen, running = 0, 0.0
    for step, batch in enumerate(stream(items, batch_tokens, seed), start=1):
        if step > steps:
            break
        if step <= first:
            continue
        loss = loss_of(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step(step, schedule(step, steps))
        seen += sum(len(item.ids) for item in batch)
        running += (loss.item() - running) * max(0.05, 1 / (step - first))
        if step % 10 == 0:
            rate = seen / (time.monotonic() - started)
            print(f"step {step}/{steps} loss {running:.3f} tokens/s {rate:.0f}", flush=True)
        if time.monotonic() - saved > _SAVE_EVERY_S or step == steps:
            _save(model, optimiser, state_dir, step)
            saved = time.monotonic()


def stream(items: Sequence[Encoded], tokens: int, seed: int) -> Iterator[list[Encoded]]:
    """Batches of about `tokens` tokens, epoch after epoch, without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from batches(items, tokens, generator)


def _save(model: nn.Module, optimiser: MuonAdam, state_dir: Path, step: int) -> None:
    tensors = {f"p/{n}": p.detach().clone() for n, p in optimiser.parameters.items()}
    tensors |= {f"s/{n}": s for n, s in optimiser.state.items()} | {"step": torch.tensor(step)}
    partial = state_dir / "state.tmp"
    save_file(tensors, partial)
    partial.replace(state_dir / "state.safetensors")


def _resume(model: nn.Module, optimiser: MuonAdam, state_dir: Path) -> int:
    path = state_dir / "state.safetensors"
    if not path.is_file():
        return 0
    tensors = load_file(path)
    with torch.no_grad():
        for name, p in optimiser.parameters.items():
            p.copy_(tensors[f"p/{name}"])
        for name, s in optimiser.state.items():
            s.copy_(tensors[f"s/{name}"])
    return int(tensors["step"])
