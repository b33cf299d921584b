"""Finding the places of a Hugging Face causal LM that can be adapted: linear layers, attention, feed-forward, head.

Found by structure, not by model name, so that a new architecture made of the usual parts works; what cannot be found
is an error that names what is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from adaptd.errors import ConfigError

#: Child names of a feed-forward module: the projections from the hidden size, and the one back to it. Two projections
#: from the hidden size mean a gated unit, down(act(first(x)) * second(x)); one means down(act(up(x))).
_FFN_SHAPES: tuple[tuple[tuple[str, ...], str], ...] = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("up_proj",), "down_proj"),
    (("fc1",), "fc2"),
    (("c_fc",), "c_proj"),
    (("dense_h_to_4h",), "dense_4h_to_h"),
)
#: Children that architectures feed with one tensor, in the order in which they are called.
_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_ACTIVATIONS = ("act_fn", "activation_fn", "act", "activation")


def sibling_groups(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Layers by name, those together that architectures feed with one tensor."""
    left, found = dict.fromkeys(names), []
    for name in list(left):
        parent, _, own = name.rpartition(".")
        for siblings in _SIBLINGS:
            together = tuple(f"{parent}.{sibling}" if parent else sibling for sibling in siblings)
            if own == siblings[0] and all(sibling in left for sibling in together):
                found.append(together)
                for sibling in together:
                    del left[sibling]
    return found + [(name,) for name in left]


def base_layer(layer: nn.Module) -> nn.Module:
    """The layer itself, or the one that a peft wrapper holds."""
    inner = getattr(layer, "base_layer", layer)
    assert isinstance(inner, nn.Module)
    return inner


def weight_of(layer: nn.Module) -> Tensor:
    """The weight as [out, in], a view: Conv1D (GPT-2) stores it transposed. A peft wrapper gives its base layer's."""
    base = base_layer(layer)
    weight = base.get_parameter("weight").detach()
    return weight.T if isinstance(base, Conv1D) else weight


def bias_of(layer: nn.Module) -> Tensor | None:
    """The bias [out] of a linear layer, None if it has none."""
    bias = getattr(base_layer(layer), "bias", None)
    return bias.detach() if isinstance(bias, Tensor) else None


def is_silu(activation: object) -> bool:
    """Whether an activation is x sigmoid(x): torch's module of that name or transformers' own."""
    return type(activation).__name__ in ("SiLU", "SiLUActivation")


@dataclass(frozen=True)
class Ffn:
    """One feed-forward module of the draft, hidden size H and intermediate size I."""

    name: str
    module: nn.Module
    inner: tuple[str, ...]
    outer: str
    activation: Callable[[Tensor], Tensor]

    @property
    def hidden(self) -> int:
        """H."""
        return weight_of(self.layer(self.outer)).shape[0]

    @property
    def intermediate(self) -> int:
        """I."""
        return weight_of(self.layer(self.outer)).shape[1]

    def layer(self, child: str) -> nn.Module:
        """One of its linear layers, by child name."""
        return self.module.get_submodule(child)

    def formula(self, x: Tensor) -> Tensor:
        """What this package takes the module to compute, [..., H] to [..., H]."""
        units = [functional.linear(x, weight_of(self.layer(name)), bias_of(self.layer(name))) for name in self.inner]
        active = self.activation(units[0])
        if len(units) == 2:
            active = active * units[1]
        outer = self.layer(self.outer)
        return functional.linear(active, weight_of(outer), bias_of(outer))


def linear_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Every linear layer by name, except the output head: that one may share its weight with the embedding."""
    head = _head(model)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }


def attention_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The linear layers inside attention modules, by name.

    Raises:
      ConfigError: none is recognised; the message names the linear layers there are.
    """
    layers = linear_layers(model)
    found = {name: layer for name, layer in layers.items() if _is_attention(name.split(".")[:-1])}
    if not found:
        raise ConfigError(
            f"no attention layer was recognised in {type(model).__name__}; its linear layers are "
            f"{_suffixes(layers)}: name those to adapt in lora_targets"
        )
    return found


def named_layers(model: PreTrainedModel, targets: Sequence[str]) -> dict[str, nn.Module]:
    """The linear layers whose name is, or ends in, one of `targets` (`q_proj`, `mlp.c_proj`).

    Raises:
      ConfigError: a target names no linear layer; the message names those there are.
    """
    layers = linear_layers(model)
    found: dict[str, nn.Module] = {}
    for target in targets:
        matched = {n: layer for n, layer in layers.items() if n == target or n.endswith(f".{target}")}
        if not matched:
            raise ConfigError(
                f"lora target {target!r} names no linear layer of {type(model).__name__}; "
                f"there are {_suffixes(layers)} (the output head is adapted with head_rank)"
            )
        found |= matched
    return {name: layer for name, layer in layers.items() if name in found}


def ffns(model: PreTrainedModel) -> list[Ffn]:
    """The feed-forward modules, in layer order; the model must be in eval mode.

    Raises:
      ConfigError: none is recognised, or one computes something else than its children suggest.
    """
    found = [ffn for name, module in model.named_modules() if (ffn := _as_ffn(name, module)) is not None]
    if not found:
        raise ConfigError(
            f"no feed-forward module was recognised in {type(model).__name__}, so a private expert has no place; its "
            f"linear layers are {_suffixes(linear_layers(model))}: use scope lora"
        )
    for ffn in found:
        _check_formula(ffn)
    return found


def head_name(model: PreTrainedModel) -> str:
    """The name of the output head, a linear layer.

    Raises:
      ConfigError: the model has none.
    """
    head = _head(model)
    for name, module in model.named_modules():
        if module is head and isinstance(module, nn.Linear):
            return str(name)
    raise ConfigError(f"{type(model).__name__} has no linear output head: set head_rank to 0")


def embedding_name(model: PreTrainedModel) -> str:
    """The name of the input embedding.

    Raises:
      ConfigError: the model has none.
    """
    embedding = model.get_input_embeddings()
    for name, module in model.named_modules():
        if module is embedding:
            return str(name)
    raise ConfigError(f"{type(model).__name__} has no input embedding: set embed_rank to 0")


def _head(model: PreTrainedModel) -> nn.Module | None:
    head: nn.Module | None = model.get_output_embeddings()
    return head


def _is_attention(path: Sequence[str]) -> bool:
    return any("attn" in part or "attention" in part for part in path)


def _as_ffn(name: str, module: nn.Module) -> Ffn | None:
    children = dict(module.named_children())
    # OPT keeps fc1 and fc2 beside its attention, in a layer that also adds the residual: not a feed-forward module.
    if _is_attention([*name.split("."), *children]):
        return None
    activation = next((getattr(module, a) for a in _ACTIVATIONS if callable(getattr(module, a, None))), None)
    for inner, outer in _FFN_SHAPES:
        if activation is not None and children.keys() >= {*inner, outer}:
            return Ffn(name, module, inner, outer, activation)
    return None


@torch.no_grad()
def _check_formula(ffn: Ffn) -> None:
    """Two computations of one random input; an architecture that scales or clips inside would differ."""
    weight = weight_of(ffn.layer(ffn.outer))
    x = torch.randn(2, 3, ffn.hidden, generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)
    expected, actual = ffn.module(x).float(), ffn.formula(x).float()
    tolerance = 1e-4 if weight.dtype == torch.float32 else 5e-2
    if (expected - actual).abs().max() > tolerance * expected.abs().max().clamp(min=1e-6):
        raise ConfigError(
            f"{ffn.name} ({type(ffn.module).__name__}) computes more than its layers {ffn.inner} and {ffn.outer}: "
            "a private expert cannot be added to it; use scope lora"
        )


def _suffixes(layers: dict[str, nn.Module]) -> str:
    return ", ".join(sorted({name.split(".")[-1] for name in layers})) or "none"
