"""Low-rank adaptation (Hu et al., 2021) of linear layers: W' = W + (alpha / rank) B A.

Training form: peft, unmerged. Serving form: one matrix a layer, the cost of the base; under a request gate, whose
rows get more or less of it, A and B stay beside the layer, in two products for all layers that read the same
(`WideLora`). A [rank, in] starts random, B [out, rank] at zero. Tensors are named `<layer>.lora_A.weight` and
`<layer>.lora_B.weight`: with the prefix `base_model.model.` these are the names in a peft adapter file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from adaptd.models.layers import bias_of, sibling_groups, weight_of
from adaptd.models.part import Part, learned
from adaptd.models.request_gate import Openness


class Lora(Part):
    """LoRA tensors of several layers; a subclass says where they act."""

    def __init__(self, layers: Mapping[str, nn.Module], rank: int, alpha: float) -> None:
        super().__init__()
        self._names = tuple(layers)
        self._transposed = {name for name, layer in layers.items() if isinstance(layer, Conv1D)}
        self._scaling = alpha / rank

    def delta(self, name: str) -> Tensor:
        """What is added to the weight [out, in] of a layer, float32."""
        up, down = self.parameters[f"{name}.lora_B.weight"], self.parameters[f"{name}.lora_A.weight"]
        return self._scaling * (up @ down)

    def fold_into(self, state: dict[str, Tensor], config: Any) -> None:
        """Add the deltas to the weights."""
        for name in self._names:
            weight, delta = state[f"{name}.weight"], self.delta(name)
            total = weight.float() + (delta.T if name in self._transposed else delta)
            state[f"{name}.weight"] = total.to(weight.dtype)


class PeftLora(Lora):
    """The training form: peft wraps the layers in place; the base weights stay frozen beside A and B."""

    def __init__(
        self, model: PreTrainedModel, layers: Mapping[str, nn.Module], rank: int, alpha: float, openness: Openness
    ) -> None:
        # Imported here: peft takes seconds to import and a decoder never needs it.
        from peft import LoraConfig, inject_adapter_in_model

        super().__init__(layers, rank, alpha)
        inject_adapter_in_model(
            LoraConfig(
                r=rank,
                lora_alpha=alpha,  # type: ignore[arg-type]  # annotated int, used only in alpha / r
                target_modules=list(layers),
                fan_in_fan_out=bool(self._transposed),
            ),
            model,
        )
        for name in layers:
            wrapper = model.get_submodule(name)
            for matrix, random in (("lora_A", True), ("lora_B", False)):
                linear = wrapper.get_submodule(f"{matrix}.default").float()
                weight = linear.get_parameter("weight")
                self.add(f"{name}.{matrix}.weight", weight, random=random, matrix=True)
            linear.register_forward_hook(lambda _layer, _inputs, output: openness.scale(output))

    def refresh(self) -> None:
        """Nothing to do: A and B act in the forward pass."""


class MergedLora(Lora):
    """The serving form: each layer's weight becomes pristine + delta, in place, recomputed from the pristine copy."""

    def __init__(self, layers: Mapping[str, nn.Module], rank: int, alpha: float, pristine: dict[str, Tensor]) -> None:
        """`pristine` gets the copies of the base weights under their names in the base model."""
        super().__init__(layers, rank, alpha)
        self._places: list[tuple[str, Tensor, Tensor]] = []
        for name, layer in layers.items():
            live = weight_of(layer)
            # Cloned as stored, so that the name keeps its meaning in the base model's state.
            stored = pristine[f"{name}.weight"] = layer.get_parameter("weight").detach().clone()
            self._places.append((name, live, stored.T if name in self._transposed else stored))
            rows, columns = live.shape
            self.add(f"{name}.lora_A.weight", learned(rank, columns, device=live.device), random=True, matrix=True)
            self.add(f"{name}.lora_B.weight", learned(rows, rank, device=live.device), matrix=True)

    @torch.no_grad()
    def refresh(self) -> None:
        """Recompute every merged weight."""
        for name, live, pristine in self._places:
            live.copy_(pristine.float() + self.delta(name))


class GatedLora(Lora):
    """The serving form under a request gate: each layer is replaced by a `LoraLayer` around it."""

    def __init__(
        self, model: PreTrainedModel, layers: Mapping[str, nn.Module], rank: int, alpha: float, openness: Openness
    ) -> None:
        super().__init__(layers, rank, alpha)
        placed: dict[str, LoraLayer] = {}
        for name, layer in layers.items():
            rows, columns = weight_of(layer).shape
            device = weight_of(layer).device
            down = self.add(f"{name}.lora_A.weight", learned(rank, columns, device=device), random=True, matrix=True)
            up = self.add(f"{name}.lora_B.weight", learned(rows, rank, device=device), matrix=True)
            placed[name] = LoraLayer(layer, down, up, self._scaling, openness)
            model.set_submodule(name, placed[name])
        for names in sibling_groups(placed):
            members = [placed[name] for name in names]
            if all(WideLora.fits(member.base_layer) for member in members):
                WideLora(members)

    def refresh(self) -> None:
        """Nothing to do: A and B act in the forward pass."""


class LoraLayer(nn.Module):
    """[..., in] to [..., out]: the layer and, as far as the row's request gate is open, what LoRA adds in float32."""

    def __init__(
        self, base_layer: nn.Module, down: nn.Parameter, up: nn.Parameter, scaling: float, openness: Openness
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.down, self.up = down, up
        self.scaling, self.openness = scaling, openness
        self.wide: WideLora | None = None

    def forward(self, x: Tensor) -> Tensor:
        """W x + s (alpha / rank) B A x."""
        if self.wide is not None and self.wide.alone:
            return self.wide(x)
        base: Tensor = self.base_layer(x)
        low = self.openness.scale(functional.linear(x.float(), self.down)) * self.scaling
        return base + functional.linear(low, self.up).to(base.dtype)


class WideLora:
    """LoRA of layers that read the same input, [..., in] to [..., out of all layers], in two products in the place of nine.

    One matrix holds, by rows, the layers' weights and their A's, another the B's as blocks on its diagonal. All of them become
    views of these: no memory is held twice, and what is copied into a tensor is copied here. Weights of another precision
    than A and B have a matrix of their own, and a third product.
    """

    def __init__(self, layers: Sequence[LoraLayer]) -> None:
        self.alone = len(layers) == 1
        self._openness, self.scaling = layers[0].openness, layers[0].scaling
        weights = [weight_of(layer.base_layer) for layer in layers]
        downs = [layer.down.detach() for layer in layers]
        ranks = [len(down) for down in downs]
        out = sum(len(weight) for weight in weights)
        self._one: Tensor | None = None
        if weights[0].dtype is downs[0].dtype:
            self._one = torch.cat([*weights, *downs])
            self.weight, self.down = self._one[:out], self._one[out:]
        else:
            self.weight, self.down = torch.cat(weights), torch.cat(downs)
        self.up = downs[0].new_zeros(out, sum(ranks))
        biases = [bias_of(layer.base_layer) for layer in layers]
        self.bias: Tensor | None = None
        if any(bias is not None for bias in biases):
            parts = [
                weight.new_zeros(len(weight)) if bias is None else bias
                for weight, bias in zip(weights, biases, strict=True)
            ]
            self.bias = torch.cat(parts)
        row, low = 0, 0
        for layer, weight, rank in zip(layers, weights, ranks, strict=True):
            rows, columns = slice(row, row + len(weight)), slice(low, low + rank)
            self.up[rows, columns] = layer.up.detach()
            layer.base_layer.get_parameter("weight").data = self.weight[rows]
            layer.down.data = self.down[columns]
            layer.up.data = self.up[rows, columns]
            layer.wide = self
            row, low = row + len(weight), low + rank

    @staticmethod
    def fits(layer: nn.Module) -> bool:
        """Whether it is a layer that keeps its weight as [out, in]."""
        return type(layer) is nn.Linear

    def __call__(self, x: Tensor) -> Tensor:
        """W x + s (alpha / rank) B A x of all layers, one behind the other."""
        out = len(self.weight)
        if self._one is None:
            base, low = functional.linear(x, self.weight, self.bias), functional.linear(x.float(), self.down)
        else:
            read = functional.linear(x, self._one)
            base, low = read[..., :out], read[..., out:]
            if self.bias is not None:
                base = base + self.bias
        low = self._openness.scale(low) * self.scaling
        if self._one is None:
            return base + functional.linear(low, self.up).to(base.dtype)
        total = torch.addmm(base.flatten(0, -2), low.flatten(0, -2), self.up.T)
        return total.view(*x.shape[:-1], out)
