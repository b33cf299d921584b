"""The serving form of the private expert: shared and private FFN as one wide FFN, gate included.

One matrix holds, by rows, the first projections of shared and private, the second ones if the base is a gated unit,
and the gate; another holds both projections back, by columns. The gate scales the private intermediate activations, which
is the same as scaling the private output. Two matrix products a layer, one fewer than a gated-unit base alone.

The base FFN's weights become views of these matrices: no memory is held twice, and a LoRA on the base FFN that writes
its merged weights in place writes here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from adaptd.models.layers import Ffn, bias_of, is_silu, weight_of
from adaptd.models.private_expert import GATE_GAIN, ExpertTensors, PrivateExperts, opened
from adaptd.models.request_gate import Openness


class FusedExperts(PrivateExperts):
    """The serving form: each FFN module is replaced by a `FusedExpertFfn`."""

    def __init__(self, model: PreTrainedModel, ffns: list[Ffn], width: int, gated: bool, openness: Openness) -> None:
        super().__init__(ffns, width, gated)
        self._fused: list[FusedExpertFfn] = []
        for ffn in ffns:
            fused = FusedExpertFfn(ffn, self.experts[ffn.name], openness)
            self._fused.append(fused)
            model.set_submodule(ffn.name, fused)

    def refresh(self) -> None:
        """Copy the learned tensors into the wide matrices."""
        for fused in self._fused:
            fused.refresh()


class Parts(NamedTuple):
    """Of a gated-unit FFN with its expert."""

    width: int
    """I + w."""
    shared: int
    """I."""
    gated: bool
    """Whether the last row of `inner` is the gate's."""


class FusedExpertFfn(nn.Module):
    """Shared and private FFN, hidden H, intermediate I, width w: [..., H] to [..., H], in the base's precision."""

    inner: Tensor
    inner_bias: Tensor | None
    outer: Tensor
    outer_bias: Tensor | None

    def __init__(self, ffn: Ffn, expert: ExpertTensors, openness: Openness) -> None:
        super().__init__()
        self._expert = expert
        self._openness = openness
        self._activation = ffn.activation
        self._intermediate = ffn.intermediate
        self._wide = ffn.intermediate + expert.down.shape[1]
        self._sizes = [self._wide] * len(ffn.inner) + ([1] if expert.gate is not None else [])
        like = weight_of(ffn.layer(ffn.outer))
        biases = [bias_of(ffn.layer(name)) for name in ffn.inner]
        self.register_buffer("inner", like.new_zeros(sum(self._sizes), ffn.hidden), persistent=False)
        self.register_buffer("outer", like.new_zeros(ffn.hidden, self._wide), persistent=False)
        has_bias = any(bias is not None for bias in biases)
        self.register_buffer("inner_bias", like.new_zeros(sum(self._sizes)) if has_bias else None, persistent=False)
        self.register_buffer("outer_bias", bias_of(ffn.layer(ffn.outer)), persistent=False)

        for index, (name, bias) in enumerate(zip(ffn.inner, biases, strict=True)):
            rows = slice(index * self._wide, index * self._wide + self._intermediate)
            _become_view(ffn.layer(name), self.inner[rows])
            if bias is not None and self.inner_bias is not None:
                self.inner_bias[rows] = bias
        _become_view(ffn.layer(ffn.outer), self.outer[:, : self._intermediate])

    def parts(self) -> Parts | None:
        """How the wide matrices are divided; None where the base is not a unit gated by x sigmoid(x)."""
        if not is_silu(self._activation) or len(self._sizes) - (self._expert.gate is not None) != 2:
            return None
        return Parts(self._wide, self._intermediate, self._expert.gate is not None)

    def forward(self, x: Tensor) -> Tensor:
        """h' of `adaptd.models.private_expert`."""
        units = torch.split(functional.linear(x, self.inner, self.inner_bias), self._sizes, -1)
        active: Tensor = self._activation(units[0])
        gated = self._expert.gate is not None
        if len(units) == 2 + gated:
            active = active * units[1]
        if gated:
            active[..., self._intermediate :] *= self._openness.scale(opened(units[-1]))
        elif self._openness.value is not None:
            active[..., self._intermediate :] *= self._openness.value
        return functional.linear(active, self.outer, self.outer_bias)

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the expert's tensors into their rows and columns."""
        shared, wide = self._intermediate, self._wide
        for index, rows in enumerate(self._expert.up.chunk(self.inner.shape[0] // wide)):
            self.inner[index * wide + shared : (index + 1) * wide].copy_(rows)
        self.outer[:, shared:].copy_(self._expert.down)
        if self._expert.gate is not None:
            self.inner[-1:].copy_(GATE_GAIN * self._expert.gate)


def _become_view(layer: nn.Module, place: Tensor) -> None:
    """Move a layer's weight into `place` [out, in], a part of a wider matrix, and let the layer refer to it."""
    place.copy_(weight_of(layer))
    layer.get_parameter("weight").data = place.T if isinstance(layer, Conv1D) else place
