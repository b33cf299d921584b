"""The same function at a higher cost: a Llama with more parameters and, to rounding, the same distribution.

What speculation is worth depends on how often the draft is right and on how much dearer the target is. Inflating a target
leaves the first as it is and sets the second, so that real acceptance can be measured at the costs of a large model.

* Residual stream: embeddings and output projections get zero rows, so the added components stay zero. Their zeros lower
  the mean square that RMSNorm divides by, from m to m H / H'; with the weight times sqrt(H / H') and epsilon times H / H'
  the quotient is as before.
* Feed-forward: added units have random input weights and zero columns in the output projection.
* Attention: added heads likewise; the number of query heads a key-value head stays, so that old heads keep their groups.
* Depth: in added layers both output projections are zero.

All added input weights are random, not zero: the arithmetic is done and its values are ordinary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from adaptd.models.load import cast_parameters, freeze, load_causal_lm, load_tokenizer

#: Hidden size over layers, about that of published models of 0.1 to 10 billion parameters.
_ASPECT = (40, 160)
_STD = 0.02


@dataclass(frozen=True, slots=True)
class Shape:
    """What an inflated Llama is made of."""

    hidden: int
    intermediate: int
    layers: int
    kv_heads: int

    def parameters(self, config: Any) -> int:
        """Weights of a model of this shape with the vocabulary, head size and grouping of `config`."""
        heads = self.kv_heads * _group(config)
        attention = self.hidden * _head_dim(config) * 2 * (heads + self.kv_heads)
        layer = attention + 3 * self.hidden * self.intermediate + 2 * self.hidden
        tables = 1 if config.tie_word_embeddings else 2
        return int(self.layers * layer + self.hidden * (tables * config.vocab_size + 1))


def shape_for(config: Any, parameters: int) -> Shape:
    """The shape nearest to `parameters` that holds a model of `config`; feed-forward units are 3 times the hidden size.

    Raises: ValueError: the model has more parameters already.
    """
    own = Shape(config.hidden_size, config.intermediate_size, config.num_hidden_layers, _kv_heads(config))
    if parameters < own.parameters(config):
        raise ValueError(f"parameters ({parameters}) must be at least {own.parameters(config)}, those the model has")
    # Heads as wide together as the residual stream.
    width = _group(config) * _head_dim(config)
    shapes = [own]
    for kv_heads in range(max(_kv_heads(config), -(-config.hidden_size // width)), 8192 // width + 1):
        hidden = kv_heads * width
        units = max(config.intermediate_size, 3 * hidden)
        for layers in range(config.num_hidden_layers, 97):
            if _ASPECT[0] <= hidden / layers <= _ASPECT[1]:
                shapes.append(Shape(hidden, units, layers, kv_heads))
    return min(shapes, key=lambda shape: abs(shape.parameters(config) - parameters))


def inflate(model: PreTrainedModel, shape: Shape, *, seed: int = 0) -> LlamaForCausalLM:
    """A model of that shape that computes what `model` computes, in its precision, in eval mode.

    Args:
      model: a Llama without biases.
      shape: at least as large everywhere.
      seed: of the added weights.

    Raises: ValueError: another architecture, or a shape that is smaller somewhere.
    """
    config = cast(Any, model.config)
    if not isinstance(model, LlamaForCausalLM) or config.attention_bias or config.mlp_bias:
        raise ValueError(f"{type(model).__name__} cannot be inflated: only a Llama without biases can")
    have = (config.hidden_size, config.intermediate_size, config.num_hidden_layers, _kv_heads(config))
    want = (shape.hidden, shape.intermediate, shape.layers, shape.kv_heads)
    if any(new < old for new, old in zip(want, have, strict=True)):
        raise ValueError(f"shape {want} must be at least {have} (hidden, intermediate, layers, key-value heads)")
    ratio = config.hidden_size / shape.hidden
    settings: dict[str, Any] = config.to_dict() | {
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "num_attention_heads": shape.kv_heads * _group(config),
        "head_dim": _head_dim(config),
        "rms_norm_eps": config.rms_norm_eps * ratio,
    }
    larger = LlamaForCausalLM(LlamaConfig(**settings))
    generator = torch.Generator().manual_seed(seed)
    old = model.state_dict()
    with torch.no_grad():
        for name, parameter in larger.named_parameters():
            _fill(name, parameter, old.get(name), math.sqrt(ratio), generator)
    larger.generation_config = model.generation_config
    freeze(larger)
    cast_parameters(larger, next(model.parameters()).dtype)
    return larger


def save_inflated(source: str, folder: Path, parameters: int, *, dtype: str, seed: int = 0) -> Shape:
    """Write the inflation of the model in folder `source`, with its tokenizer, as any Hugging Face folder.

    Raises: ValueError: as `shape_for` and `inflate`.
    """
    model = load_causal_lm(source, dtype=dtype, device="cpu")
    shape = shape_for(model.config, parameters)
    inflate(model, shape, seed=seed).save_pretrained(folder)
    load_tokenizer(source).save_pretrained(folder)
    return shape


def _fill(name: str, new: Tensor, old: Tensor | None, scale: float, generator: torch.Generator) -> None:
    kind = name.rsplit(".", 2)[-2]
    if kind.endswith("norm"):
        new.fill_(1.0)
    elif kind in ("o_proj", "down_proj", "embed_tokens", "lm_head"):
        new.zero_()
    else:
        new.normal_(0.0, _STD, generator=generator)
    if old is None:
        return
    new[tuple(slice(size) for size in old.shape)] = old.float() * scale if kind.endswith("norm") else old.float()


def _kv_heads(config: Any) -> int:
    return int(config.num_key_value_heads or config.num_attention_heads)


def _group(config: Any) -> int:
    return int(config.num_attention_heads) // _kv_heads(config)


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
