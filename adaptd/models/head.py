"""A low-rank correction of the output head: logits = lm_head(h) + g * (up (down h) + b).

Hidden size H, rank r, vocabulary size N. `up` [N, r] and b [N] start at zero, `down` [r, H] random. With tied
embeddings the head's weight is the embedding; the correction is added beside it, so the embedding is never touched.
g is a gate as of the private expert (`adaptd.models.private_expert`), 2 sigmoid(GATE_GAIN w . h); without it g is one
and the correction can be merged.

Tensors: `<head>.low_rank.down.weight`, `<head>.low_rank.up.weight`, `<head>.low_rank.bias`,
`<head>.low_rank.gate.weight` [1, H].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from adaptd.errors import ConfigError
from adaptd.models.part import Part, learned
from adaptd.models.private_expert import GATE_GAIN, opened
from adaptd.models.request_gate import Openness

#: Rows of the head merged at a time: bounds the float32 temporary for vocabularies of 150,000 and more.
_MERGE_ROWS = 16384


class HeadCorrection(Part):
    """The tensors of the correction; a subclass says how it acts."""

    def __init__(self, name: str, head: nn.Linear, rank: int, with_bias: bool, gated: bool) -> None:
        super().__init__()
        device = head.weight.device
        self._name = name
        self.down = self.add(
            f"{name}.low_rank.down.weight", learned(rank, head.in_features, device=device), random=True
        )
        self.up = self.add(f"{name}.low_rank.up.weight", learned(head.out_features, rank, device=device))
        bias = learned(head.out_features, device=device) if with_bias else None
        self.bias = bias if bias is None else self.add(f"{name}.low_rank.bias", bias)
        gate = learned(1, head.in_features, device=device) if gated else None
        self.gate = gate if gate is None else self.add(f"{name}.low_rank.gate.weight", gate)

    def fold_into(self, state: dict[str, Tensor], config: Any) -> None:
        """Merge up down into an untied head.

        Raises:
          ConfigError: there is a bias or a gate, which a causal LM's head has no place for.
        """
        if self.gate is not None:
            raise ConfigError("the output head's correction is gated and cannot be merged: adapt with gated: false")
        key = f"{self._name}.weight"
        if self.bias is not None and f"{self._name}.bias" not in state:
            raise ConfigError(
                "the output head's learned bias has no place in a plain model: adapt with head_bias: false, or "
                "head_rank: 0 where the engine shares the head with the target"
            )
        merged = torch.empty_like(state[key])
        merge(merged, state[key], self.up, self.down)
        state[key] = merged
        if self.bias is not None:
            bias = state[f"{self._name}.bias"]
            state[f"{self._name}.bias"] = (bias.float() + self.bias).to(bias.dtype)
        # A corrected head shares nothing with the embedding any more.
        config.tie_word_embeddings = False


class TrainedHead(HeadCorrection):
    """The training form, and the serving form of a gated correction: the head is replaced by a `LowRankHead`."""

    def __init__(
        self,
        model: PreTrainedModel,
        name: str,
        rank: int,
        with_bias: bool,
        gated: bool,
        openness: Openness,
        *,
        serving: bool = False,
    ) -> None:
        head = _linear(model, name)
        super().__init__(name, head, rank, with_bias, gated)
        corrected = LowRankHead(head, self.down, self.up, self.bias, self.gate, openness)
        if serving and self.gate is not None:
            corrected = WideHead(corrected, self.gate)
        model.set_submodule(name, corrected)
        _untie(model)

    def refresh(self) -> None:
        """Nothing to do: the correction acts in the forward pass."""


class LowRankHead(nn.Module):
    """[..., H] to logits [..., N] in float32, whatever the base's precision: losses on rounded logits are noisy."""

    def __init__(
        self,
        base: nn.Linear,
        down: nn.Parameter,
        up: nn.Parameter,
        bias: nn.Parameter | None,
        gate: nn.Parameter | None,
        openness: Openness,
    ) -> None:
        super().__init__()
        self.base = base
        self.down, self.up, self.bias, self.gate = down, up, bias, gate
        self._openness = openness

    @property
    def weight(self) -> Tensor:
        """The base head's weight, where Hugging Face code expects it."""
        return self.base.weight

    def forward(self, h: Tensor) -> Tensor:
        """lm_head(h) + g (up (down h) + b)."""
        logits = self.base(h).float()
        h = h.float()
        low = functional.linear(h, self.down)
        gate = None if self.gate is None else opened(functional.linear(h, GATE_GAIN * self.gate))
        if self._openness.value is not None:
            gate = self._openness.scale(torch.ones_like(low[..., :1]) if gate is None else gate)
        if gate is not None:
            low = low * gate
        # Accumulated by the matrix product itself: [.., N] is the widest tensor of a step and costs memory traffic.
        total = torch.addmm(logits.flatten(0, -2), low.flatten(0, -2), self.up.T)
        if self.bias is not None:
            total = total + self.bias if gate is None else torch.addmm(total, gate.flatten(0, -2), self.bias[None])
        return total.view_as(logits)


class WideHead(LowRankHead):
    """The same in two products: what reads h is one matrix, [N + r + 1, H], and up and bias another, [N, r + 1].

    The tensors become views of these two: no memory is held twice, and what is copied into a tensor is copied here. A head of
    another precision than theirs keeps its own weight, and there are three products.
    """

    def __init__(self, head: LowRankHead, gate: nn.Parameter) -> None:
        base, down, up, bias = head.base, head.down, head.up, head.bias
        super().__init__(base, down, up, bias, gate, head._openness)
        size, rank = up.shape
        self._one: Tensor | None = None
        if base.weight.dtype is down.dtype:
            self._one = torch.cat([base.weight.detach(), down.detach(), gate.detach()])
            base.weight.data, self.inner = self._one[:size], self._one[size:]
        else:
            self.inner = torch.cat([down.detach(), gate.detach()])
        self.outer = torch.cat([up.detach(), up.new_zeros(size, 1) if bias is None else bias.detach()[:, None]], 1)
        down.data, gate.data, up.data = self.inner[:rank], self.inner[rank:], self.outer[:, :rank]
        if bias is not None:
            bias.data = self.outer[:, rank]

    def forward(self, h: Tensor) -> Tensor:
        """lm_head(h) + g * (up (down h) + b)."""
        size = len(self.outer)
        if self._one is None:
            logits, low = self.base(h).float(), functional.linear(h.float(), self.inner)
        else:
            read = functional.linear(h, self._one)
            logits, low = read[..., :size], read[..., size:].clone()
            if self.base.bias is not None:
                logits = logits + self.base.bias
        gate = self._openness.scale(opened(GATE_GAIN * low[..., -1:]))
        low[..., -1] = 1.0
        low *= gate
        total = torch.addmm(logits.flatten(0, -2), low.flatten(0, -2), self.outer.T)
        return total.view(*h.shape[:-1], size)


class MergedHead(HeadCorrection):
    """The serving form without a gate: a head with its own weight [N, H], W + up down, and bias; the cost of the base."""

    def __init__(self, model: PreTrainedModel, name: str, rank: int, with_bias: bool) -> None:
        head = _linear(model, name)
        super().__init__(name, head, rank, with_bias, gated=False)
        self._pristine = head.weight.detach()
        self._pristine_bias = None if head.bias is None else head.bias.detach()
        has_bias = with_bias or head.bias is not None
        self._live = nn.Linear(head.in_features, head.out_features, has_bias, head.weight.device, head.weight.dtype)
        model.set_submodule(name, self._live.requires_grad_(False))
        _untie(model)

    @torch.no_grad()
    def refresh(self) -> None:
        """Recompute weight and bias from the pristine head."""
        merge(self._live.weight, self._pristine, self.up, self.down)
        if self._live.bias is not None:
            base = torch.zeros_like(self.up[:, 0]) if self._pristine_bias is None else self._pristine_bias.float()
            self._live.bias.copy_(base if self.bias is None else base + self.bias)


@torch.no_grad()
def merge(out: Tensor, pristine: Tensor, up: Tensor, down: Tensor) -> None:
    """out = pristine + up down, [N, H], computed in float32 and rounded once."""
    for start in range(0, len(up), _MERGE_ROWS):
        rows = slice(start, start + _MERGE_ROWS)
        out[rows].copy_(torch.addmm(pristine[rows].float(), up[rows], down))


def _untie(model: PreTrainedModel) -> None:
    """What is now in the place of the head is tied to nothing: a later `tie_weights` would undo the correction."""
    model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}


def _linear(model: PreTrainedModel, name: str) -> nn.Linear:
    head = model.get_submodule(name)
    if not isinstance(head, nn.Linear):
        raise ConfigError(f"the output head {name} ({type(head).__name__}) is no linear layer: set head_rank to 0")
    return head
