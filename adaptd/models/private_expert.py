"""The private expert (EDA, paper 4 of the references; design section 5): a small learned FFN beside each frozen one.

    h' = shared(h) + g * private(h),        g = 2 sigmoid(GATE_GAIN w . h)

`shared` is the base FFN, frozen; `private` has the same form at a smaller width, and its projection back to the hidden
size starts at zero, so day 0 is the base exactly. w starts at zero: the gate starts at one, and "the gate held at one"
(ungated) is the same function with w left out.

The paper's gates are a softmax over both experts, which sum to a constant: shutting the private one off then changes
the weight of the shared one, so old traffic can never get the base back. Here the shared gate stays at one, and a shut
gate is the base. g is twice the private share of a softmax over two, whose two projections act only by their difference.

Tensors of one FFN, hidden size H, width w: `<ffn>.private.up.weight` [w, H], or [2w, H] with the rows of the gate
projection first if the base is a gated unit; `<ffn>.private.down.weight` [H, w]; `<ffn>.gate.weight` [1, H].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from adaptd.errors import ConfigError
from adaptd.models.layers import Ffn, base_layer
from adaptd.models.part import Part, learned
from adaptd.models.request_gate import Openness

#: Configuration keys that hold an intermediate size, by architecture; a fold widens the one that is there.
_WIDTH_KEYS = ("intermediate_size", "n_inner", "ffn_dim")


#: Makes the gate learn faster than the expert behind it under one learning rate: with 1 the expert reaches old traffic
#: before the gate has learned to shut there. Not ablated yet.
GATE_GAIN = 4.0


class ExpertTensors(NamedTuple):
    """The learned tensors of one private expert; see the module's docstring for shapes."""

    up: nn.Parameter
    down: nn.Parameter
    gate: nn.Parameter | None


class PrivateExperts(Part):
    """The private experts of all FFNs; a subclass says how they act."""

    def __init__(self, ffns: list[Ffn], width: int, gated: bool) -> None:
        super().__init__()
        self._ffns = ffns
        self._width = width
        self.experts: dict[str, ExpertTensors] = {}
        for ffn in ffns:
            device = next(ffn.module.parameters()).device
            up = learned(len(ffn.inner) * width, ffn.hidden, device=device)
            gate = learned(1, ffn.hidden, device=device) if gated else None
            self.experts[ffn.name] = ExpertTensors(
                self.add(f"{ffn.name}.private.up.weight", up, random=True, matrix=True),
                self.add(f"{ffn.name}.private.down.weight", learned(ffn.hidden, width, device=device), matrix=True),
                gate if gate is None else self.add(f"{ffn.name}.gate.weight", gate),
            )

    def fold_into(self, state: dict[str, Tensor], config: Any) -> None:
        """Widen every FFN by its private expert: exact, the two are blocks of one dense FFN.

        Raises:
          ConfigError: the pair is gated.
        """
        for ffn in self._ffns:
            fold(ffn, self.experts[ffn.name], state)
        key = next(k for k in _WIDTH_KEYS if hasattr(config, k))
        setattr(config, key, self._ffns[0].intermediate + self._width)


class TrainedExperts(PrivateExperts):
    """The training form: each FFN module is replaced by a `PrivateExpertFfn` around it."""

    def __init__(self, model: PreTrainedModel, ffns: list[Ffn], width: int, gated: bool, openness: Openness) -> None:
        super().__init__(ffns, width, gated)
        for ffn in ffns:
            expert, gated_unit = self.experts[ffn.name], len(ffn.inner) == 2
            wrapper = PrivateExpertFfn(ffn.module, expert, gated_unit, ffn.activation, openness)
            model.set_submodule(ffn.name, wrapper)

    def refresh(self) -> None:
        """Nothing to do: the experts act in the forward pass."""


class PrivateExpertFfn(nn.Module):
    """A frozen FFN and its private expert, [..., H] to [..., H]; the expert computes in float32."""

    def __init__(
        self,
        shared: nn.Module,
        expert: ExpertTensors,
        gated_unit: bool,
        activation: Callable[[Tensor], Tensor],
        openness: Openness,
    ) -> None:
        super().__init__()
        self._openness = openness
        self.shared = shared
        self.up, self.down, self.gate = expert
        self._gated_unit = gated_unit
        self._activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """h' of the module's docstring."""
        shared: Tensor = self.shared(x)
        h = x.float()
        units = functional.linear(h, self.up)
        if self._gated_unit:
            first, second = units.chunk(2, -1)
            active = self._activation(first) * second
        else:
            active = self._activation(units)
        private = functional.linear(active, self.down)
        if self.gate is not None:
            private = private * opened(functional.linear(h, GATE_GAIN * self.gate))
        return (shared + self._openness.scale(private)).to(x.dtype)


def opened(logit: Tensor) -> Tensor:
    """The gate g, 0 to 2, of its logit GATE_GAIN w . h; one at zero."""
    return 2.0 * torch.sigmoid(logit)


@torch.no_grad()
def fold(ffn: Ffn, expert: ExpertTensors, state: dict[str, Tensor]) -> None:
    """Widen one FFN in `state` (weights under the base model's names) by its ungated private expert.

    Raises:
      ConfigError: the expert is gated.
    """
    if expert.gate is not None:
        raise ConfigError("a gated private expert is no dense FFN and cannot be folded: adapt with gated: false")
    rows = expert.up.chunk(len(ffn.inner))
    for child, addition in zip(ffn.inner, rows, strict=True):
        _widen(state, ffn, child, addition, dim=0)
    _widen(state, ffn, ffn.outer, expert.down, dim=1)


def _widen(state: dict[str, Tensor], ffn: Ffn, child: str, addition: Tensor, *, dim: int) -> None:
    """Concatenate `addition` [out, in] to a layer's weight along `dim`; new outputs get a zero bias."""
    layer = f"{ffn.name}.{child}"
    weight = state[f"{layer}.weight"]
    if isinstance(base_layer(ffn.layer(child)), Conv1D):
        state[f"{layer}.weight"] = torch.cat([weight, addition.T.to(weight.dtype)], dim=1 - dim)
    else:
        state[f"{layer}.weight"] = torch.cat([weight, addition.to(weight.dtype)], dim=dim)
    bias = state.get(f"{layer}.bias")
    if bias is not None and dim == 0:
        state[f"{layer}.bias"] = torch.cat([bias, bias.new_zeros(addition.shape[0])])
