"""The forward pass of the plain pre-norm transformers without the machinery around it.

A decode round on a small machine is bound by how fast weights are read, if nothing else takes time. transformers' own
forward takes some 190 Python calls a layer: decorators, mask and cache bookkeeping, attention dispatch. This is the same
sum in about thirty operations a layer, over the same modules and the same `RaggedCache`, so packed layers, adapters and
hot swaps work as they do there. Architectures that it does not know go through transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

from adaptd.models.cache import FULL, GROUPED_SDPA, RaggedCache
from adaptd.models.layers import is_silu
from adaptd.models.native import native_pass, stacked
from adaptd.models.packed import Packed

#: Architectures whose layer is: norm, attention with rotary positions, add, norm, feed-forward, add.
KNOWN = ("llama", "mistral", "qwen2", "qwen3")
#: Rotary positions that are a table, whatever the length of the sequence.
_TABLES = ("default", "linear", "llama3", "yarn")


class LeanDecoder:
    """Runs a model's own modules.

    Args:
      model: in eval mode; `can_run` says whether it can be run here.
      max_length: positions there may be.
      compiled: passes over few positions are one call of compiled code, where there is a compiler (`adaptd.models.native`).
    """

    def __init__(self, model: nn.Module, max_length: int, *, compiled: bool = True) -> None:
        plain = _plain(model)
        base = plain.base_model
        config = plain.config.get_text_config(decoder=True)
        self._embed, self.head = plain.get_input_embeddings(), plain.get_output_embeddings()
        self.norm = base.norm
        kinds = getattr(config, "layer_types", None) or [FULL] * config.num_hidden_layers
        heads = config.num_attention_heads, config.num_key_value_heads
        self._groups = heads[0] // heads[1]
        self.layers = [_Layer(layer, kind, heads) for layer, kind in zip(base.layers, kinds, strict=True)]
        weight = self._embed.weight
        positions = torch.arange(max_length, device=weight.device)[None]
        cos, sin = base.rotary_emb(weight.new_zeros(1, 1, 1), positions)
        # A head's halves are rotated against each other: the sign of the swapped half is put into the table.
        half = sin.shape[-1] // 2
        self.cos, self.sin = cos[0], torch.cat((-sin[0, :, :half], sin[0, :, half:]), -1)
        self._native = native_pass(model, self) if compiled else None

    def __call__(
        self, tokens: Tensor, positions: Tensor, masks: Mapping[str, Tensor], cache: RaggedCache, *, last_only: bool
    ) -> Tensor:
        """One pass at where `cache` points.

        Args:
          tokens, positions: int64 [B, Q].
          masks: additive, [B, 1, Q, L] by kind of layer; the only one is for all layers.
          last_only: logits of the last position alone.
        Returns: logits [B, Q, V], or [B, 1, V].
        """
        hidden: Tensor = self._embed(tokens)
        if self._native is not None and self._native.takes(tokens, cache):
            return self._native(hidden, positions, masks, cache, last_only=last_only)
        rotation = self.cos[positions][:, :, None], self.sin[positions][:, :, None]
        # As `grouped_sdpa`: heads that share keys and values are more queries of them.
        folded = {kind: mask.repeat(1, 1, self._groups, 1) for kind, mask in masks.items()}
        only = next(iter(folded.values())) if len(folded) == 1 else None
        for index, layer in enumerate(self.layers):
            mask = folded[layer.kind] if only is None else only
            hidden = layer(hidden, rotation, mask, cache, index)
        if last_only:
            hidden = hidden[:, -1:]
        logits: Tensor = self.head(_normed(hidden, self.norm))
        return logits


class _Layer:
    def __init__(self, layer: Any, kind: str, heads: tuple[int, int]) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.kind, self.heads = kind, heads
        self.before, self.between = layer.input_layernorm, layer.post_attention_layernorm
        self.q, self.k, self.v, self.o = attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj
        self.norms = (getattr(attention, "q_norm", None), getattr(attention, "k_norm", None))
        self.dim, self.scale = int(attention.head_dim), float(attention.scaling)
        self._read = _stacked(self.q, self.k, self.v) or self._apart
        self.mlp, self._down = mlp, getattr(mlp, "down_proj", None)
        self._gated = _stacked(mlp.gate_proj, mlp.up_proj) if is_silu(getattr(mlp, "act_fn", None)) else None

    def __call__(
        self, hidden: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor, cache: RaggedCache, index: int
    ) -> Tensor:
        hidden = hidden + self._attend(_normed(hidden, self.before), rotation, mask, cache, index)
        return hidden.add_(self._feed(_normed(hidden, self.between)))

    def _attend(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor, cache: RaggedCache, index: int
    ) -> Tensor:
        batch, length, _ = x.shape
        heads = self._read(x).view(batch, length, -1, self.dim)
        n_q, n_kv = self.heads
        turned = heads[:, :, : n_q + n_kv]
        if self.norms[0] is not None:
            parts = turned.split((n_q, n_kv), 2)
            turned = torch.cat([_normed(part, norm) for part, norm in zip(parts, self.norms, strict=True)], 2)
        cos, sin = rotation
        turned = (turned * cos).addcmul_(turned.roll(self.dim // 2, -1), sin)
        keys, values = cache.update(
            turned[:, :, n_q:].transpose(1, 2), heads[:, :, n_q + n_kv :].transpose(1, 2), index
        )
        groups = n_q // n_kv
        query = turned[:, :, :n_q].transpose(1, 2).reshape(batch, n_kv, groups * length, self.dim)
        found = scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=self.scale)
        joined = found.view(batch, n_q, length, self.dim).transpose(1, 2).reshape(batch, length, -1)
        out: Tensor = self.o(joined)
        return out

    def _apart(self, x: Tensor) -> Tensor:
        return torch.cat((self.q(x), self.k(x), self.v(x)), -1)

    def _feed(self, x: Tensor) -> Tensor:
        if self._gated is None or self._down is None:
            whole: Tensor = self.mlp(x)
            return whole
        gate, up = self._gated(x).chunk(2, -1)
        out: Tensor = self._down(silu(gate).mul_(up))
        return out


def can_run(model: nn.Module) -> bool:
    """Whether a model is one of the known architectures, with attention that takes an additive mask."""
    plain = _plain(model)
    config = getattr(plain, "config", None)
    if config is None or getattr(config, "model_type", "") not in KNOWN:
        return False
    rope = getattr(config, "rope_parameters", None) or {}
    kernel = getattr(config, "_attn_implementation", "")
    return rope.get("rope_type", "default") in _TABLES and kernel in ("sdpa", GROUPED_SDPA)


def _plain(model: nn.Module) -> Any:
    """The model inside an adapter's wrapper."""
    found = cast(Any, model)
    return found.get_base_model() if hasattr(found, "get_base_model") else found


def _stacked(*layers: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """The one product of all these layers, if there is one."""
    one = stacked(*layers)
    return partial(one.product, first=True, last=True) if isinstance(one, Packed) else one


def _normed(x: Tensor, norm: Any) -> Tensor:
    return rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)
