"""A lean forward pass as one call of compiled code (`kernels/decoder.cpp`), for the few positions of a round.

The same modules: what is handed over are their tensors, so that what a swap copies into them acts at once. A module whose
sum the compiled code does not know keeps the whole model in Python.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from adaptd.models.cache import RaggedCache, RaggedLayer
from adaptd.models.compiled import kernels
from adaptd.models.fused_expert import FusedExpertFfn
from adaptd.models.head import WideHead
from adaptd.models.layers import base_layer, is_silu
from adaptd.models.lora import LoraLayer, WideLora
from adaptd.models.packed import Packed, PackedLinear
from adaptd.models.private_expert import GATE_GAIN
from adaptd.models.request_gate import request_gate

#: Positions of all rows together in a pass, as FEW_ROWS of kernels/product.h; prompts are read by the products of a library.
MOST_POSITIONS = 96
#: As `turned` in kernels/attention.h holds a head.
_MOST_DIM = 1024


class NativePass:
    """What `LeanDecoder` does, for a model all of whose parts are known here: see `native_pass`."""

    def __init__(self, decoder: Any, kinds: Sequence[str], model: nn.Module, head: nn.Module | None) -> None:
        self._decoder, self._kinds, self._head = decoder, kinds, head
        gate = request_gate(model)
        self._openness = None if gate is None else gate.openness
        self._stores: tuple[RaggedCache, list[Tensor], list[Tensor]] | None = None

    def takes(self, tokens: Tensor, cache: RaggedCache) -> bool:
        """Whether this pass is for here: few positions, and the cache is allocated."""
        return tokens.numel() <= MOST_POSITIONS and cast(RaggedLayer, cache.layers[-1]).is_initialized

    def __call__(
        self, hidden: Tensor, positions: Tensor, masks: Mapping[str, Tensor], cache: RaggedCache, *, last_only: bool
    ) -> Tensor:
        """Logits [B, Q, V] or [B, 1, V] from embeddings [B, Q, H], which are overwritten; else as `LeanDecoder`."""
        if self._stores is None or self._stores[0] is not cache:
            layers = [cast(RaggedLayer, layer) for layer in cache.layers]
            keys, values = ([cast(Tensor, getattr(layer, name)) for layer in layers] for name in ("keys", "values"))
            self._stores = cache, keys, values
        _, keys, values = self._stores
        only = len(masks) == 1
        given = list(masks.values()) * len(self._kinds) if only else [masks[kind] for kind in self._kinds]
        openness = None if self._openness is None else self._openness.value
        places = cache.index_for(keys[0].shape[1])
        found: Tensor = self._decoder.forward(
            hidden, positions, given, keys, values, places, cache.first, last_only, openness
        )
        return found if self._head is None else cast(Tensor, self._head(found))


def native_pass(model: nn.Module, lean: Any) -> NativePass | None:
    """The pass of a `LeanDecoder`; None if some part of the model is not known here, or there are no kernels.

    Args:
      model: what `lean` was made of.
    """
    norm, head = lean.norm, lean.head
    weight = norm.weight
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.bfloat16):
        return None
    classes = kernels()
    if classes is None:
        return None
    kinds = sorted({layer.kind for layer in lean.layers})
    layers = [_layer(classes, layer, kinds.index(layer.kind), weight.dtype) for layer in lean.layers]
    dim = lean.layers[0].dim
    if any(layer is None for layer in layers) or lean.cos.shape[-1] != dim or dim > _MOST_DIM:
        return None
    inside = _linear(classes, head)
    tables = lean.cos.float().contiguous(), lean.sin.float().contiguous()
    decoder = classes.Decoder(layers, weight, norm.variance_epsilon, inside, *tables)
    return NativePass(decoder, kinds, model, head if inside is None else None)


def _layer(classes: Any, layer: Any, kind: int, dtype: torch.dtype) -> Any | None:
    read = _siblings(classes, layer.q, layer.k, layer.v)
    out = _linear(classes, layer.o)
    feed = _feed_forward(classes, layer)
    norms = [norm for norm in (layer.before, layer.between, *layer.norms) if norm is not None]
    if read is None or out is None or feed is None or any(norm.weight.dtype is not dtype for norm in norms):
        return None
    units, down, sizes, gated = feed
    weights, eps = [norm.weight for norm in norms], [float(norm.variance_epsilon) for norm in norms]
    about = [*layer.heads, layer.dim, *sizes, kind]
    return classes.Layer(read, out, units, down, weights, eps, about, layer.scale, gated)


def _feed_forward(classes: Any, layer: Any) -> tuple[list[Any], Any, tuple[int, int], bool] | None:
    """Its products, its width, how many columns of it no gate scales, and whether the last of the first product is one."""
    mlp = layer.mlp
    if isinstance(mlp, FusedExpertFfn):
        parts = mlp.parts()
        if parts is None:
            return None
        first = _stored(classes, mlp.inner, mlp.inner_bias)
        down = _stored(classes, mlp.outer, mlp.outer_bias)
        return [first], down, (parts.width, parts.shared), parts.gated
    if not is_silu(getattr(mlp, "act_fn", None)):
        return None
    units, out = _siblings(classes, mlp.gate_proj, mlp.up_proj), _linear(classes, mlp.down_proj)
    if units is None or out is None:
        return None
    width = int(cast(Any, base_layer(mlp.gate_proj)).out_features)
    return units, out, (width, width), False


def stacked(*layers: nn.Module) -> Packed | WideLora | None:
    """The one product of all these layers, if there is one."""
    if all(isinstance(layer, PackedLinear) for layer in layers):
        found = {cast(PackedLinear, layer).packed for layer in layers}
        return found.pop() if len(found) == 1 else None
    if all(isinstance(layer, LoraLayer) for layer in layers):
        wide = {cast(LoraLayer, layer).wide for layer in layers}
        return wide.pop() if len(wide) == 1 else None
    return None


def _siblings(classes: Any, *layers: nn.Module) -> list[Any] | None:
    """One product for all layers where they are stacked, else one for each; None if one of them is not known."""
    one = stacked(*layers)
    if one is not None:
        return [_packed(classes, one) if isinstance(one, Packed) else _wide(classes, one)]
    found = [_linear(classes, layer) for layer in layers]
    return None if any(layer is None for layer in found) else found


def _linear(classes: Any, layer: nn.Module) -> Any | None:
    if type(layer) is nn.Linear:
        return _stored(classes, layer.weight, layer.bias)
    if isinstance(layer, PackedLinear) and layer.alone:
        return _packed(classes, layer.packed)
    if isinstance(layer, LoraLayer) and layer.wide is not None and layer.wide.alone:
        return _wide(classes, layer.wide)
    if isinstance(layer, WideHead):
        return classes.Linear(layer.base.weight, layer.base.bias, False, layer.inner, layer.outer, 1.0, GATE_GAIN)
    return None


def _stored(classes: Any, weight: Tensor, bias: Tensor | None) -> Any:
    return classes.Linear(weight, bias, False, None, None, 1.0, 0.0)


def _packed(classes: Any, packed: Packed) -> Any:
    return classes.Linear(packed.stored, packed.bias, packed.layout == "onednn", None, None, 1.0, 0.0)


def _wide(classes: Any, wide: WideLora) -> Any:
    return classes.Linear(wide.weight, wide.bias, False, wide.down, wide.up, wide.scaling, 0.0)
