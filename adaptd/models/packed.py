"""Linear layers of a frozen model in the layout that the CPU's matrix kernels read.

A round multiplies a handful of rows with every weight of the target, so it costs what reading the weights costs, if the
kernel reads them well. `torch.nn.functional.linear` takes the weight as it is stored: in float32 a library routine that
slows down by half or more between one row and five, in bfloat16 a kernel that brings the weight into its own layout at
each call. oneDNN's layout, made once, is read two to three times as fast, and five rows cost what one costs. Not on every
processor, and not for every number of rows: of a large model both are timed on some of its weights, and the faster one is
taken. Siblings that read the same input (queries, keys and values; the two projections of a gated feed-forward) become
one product in either.

Only for weights that never change: a draft is swapped in place, and a copy in another layout would not follow.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from adaptd.models.compiled import kernels, stored_product
from adaptd.models.layers import sibling_groups

#: Layers with fewer weights gain less than the call costs.
_LEAST = 1 << 16
#: Bytes of weights on which layouts are timed: more than a processor's own caches hold, or all would look alike. A model
#: that has fewer is packed for oneDNN.
_TIMED_BYTES = 1 << 26
#: The time of the better layout, as a share of the other's, above which the difference may be noise. Then oneDNN's is taken; but
#: where the stored one has a compiled product, the stored one: a row's sum there does not depend on the rows beside it.
_SURELY = 0.9

#: How weights lie: as oneDNN reads them, or as they are stored.
Layout = Literal["onednn", "stored"]
#: Input, weight and bias to `linear` of them.
Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class Packed:
    """One weight, or several with the same input stacked.

    Args:
      layers: frozen, on the CPU; all with a bias or none.
      rows: input rows the layout is chosen for; others are computed as exactly.
      layout: of the stacked weight.
      kernel: the product with a stored one.
    """

    def __init__(
        self, layers: Sequence[nn.Linear], rows: int, layout: Layout = "onednn", kernel: Product = linear
    ) -> None:
        stacked = torch.cat([layer.weight.detach() for layer in layers])
        biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
        self.layout = layout
        self.bias = torch.cat(biases) if biases else None
        self.stored = _reordered(stacked, rows) if layout == "onednn" else stacked
        self.kernel = _packed_product if layout == "onednn" else kernel
        self._last: tuple[Tensor, Tensor] | None = None

    def product(self, x: Tensor, *, first: bool, last: bool) -> Tensor:
        """[..., in] to [..., out of all layers]; between the `first` layer and the `last` the same tensor is computed once."""
        if not first and self._last is not None and self._last[0] is x:
            found = self._last[1]
        else:
            found = self.kernel(x, self.stored, self.bias)
        # Kept from the first layer on only: a tensor that was written to since then would be the same tensor.
        self._last = (x, found) if first and not last else None if last else self._last
        return found

    def dense(self) -> Tensor:
        """[out of all layers, in]; oneDNN's is unpacked at each call."""
        return self.stored.to_dense() if self.layout == "onednn" else self.stored


class PackedLinear(nn.Module):
    """A linear layer whose weight is part of a `Packed`.

    Args:
      layer: replaced; not kept.
      packed: has its weight in rows `start` to `start + out_features`.
      last: no other layer of the same `packed` is called after this one with the same input.
    """

    def __init__(self, layer: nn.Linear, packed: Packed, start: int, *, last: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())
        # Neither a parameter nor a buffer: a tensor without strides can be neither cast nor saved.
        self.packed, self._rows = packed, slice(start, start + layer.out_features)
        self._at = {"first": start == 0, "last": last}

    @property
    def alone(self) -> bool:
        """Whether it has a `Packed` to itself."""
        return self._at["first"] and self._at["last"]

    @property
    def weight(self) -> Tensor:
        """[out, in]; oneDNN's is unpacked at each call."""
        return self.packed.dense()[self._rows]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        # A model is known by its weights (`weights_id`), in whatever layout they are.
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.weight

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        return self.packed.product(x, **self._at)[..., self._rows]


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this build and processor have the kernels for that precision."""
    ops: Any = torch.ops.mkldnn
    if not torch.backends.mkldnn.is_available() or not hasattr(ops, "_linear_pointwise"):
        return False
    return dtype is torch.float32 or (dtype is torch.bfloat16 and bool(ops._is_mkldnn_bf16_supported()))


def pack_linears(model: nn.Module, *, rows: int, compiled: bool = True) -> int:
    """Replaces the large linear layers of a frozen model, in place; their weights are freed where nothing else has them.

    All have one layout (`fastest_layout`).

    Nothing happens on another device than the CPU, or where there is neither such a layout (`can_pack`) nor a compiled product.
    The model is then for inference by one thread at a time.

    Args:
      rows: of the input that is to be fast, for example k + 1 at batch 1.
      compiled: whether the product with a stored weight may be compiled code (`adaptd.models.compiled`).
    Returns: layers replaced.
    """
    chosen: list[tuple[nn.Module, tuple[str, ...], list[nn.Linear]]] = []
    # Asked for on a CPU alone: the first time, kernels are compiled.
    on_cpu = any(parameter.device.type == "cpu" for parameter in model.parameters())
    kernel: Product = stored_product if compiled and on_cpu and kernels() is not None else linear
    for parent in list(model.modules()):
        children = {
            name: layer for name, layer in parent.named_children() if type(layer) is nn.Linear and _fits(layer, kernel)
        }
        for names in _groups(children):
            layers = [children[name] for name in names]
            if sum(layer.weight.numel() for layer in layers) < _LEAST:
                continue
            chosen.append((parent, names, layers))
    layout = fastest_layout([layers for _, _, layers in chosen], rows, kernel)
    found = 0
    while chosen:  # emptied, so that what has been replaced is freed on the way
        parent, names, layers = chosen.pop()
        packed, start = Packed(layers, rows, layout, kernel), 0
        for name, layer in zip(names, layers, strict=True):
            setattr(parent, name, PackedLinear(layer, packed, start, last=name == names[-1]))
            start += layer.out_features
            found += 1
    return found


@torch.inference_mode()
def fastest_layout(groups: Sequence[Sequence[nn.Linear]], rows: int, kernel: Product = linear) -> Layout:
    """The layout in which the first of these layers, each group as one product, take less time on `rows` rows of input.

    With the threads that are set; takes a tenth to a fifth of a second. A small model is not timed: a compiled
    `kernel` for the stored layout is taken, else "onednn".
    """
    dtype = groups[0][0].weight.dtype if groups else torch.float32
    if not can_pack(dtype):
        return "stored"
    sizes = np.cumsum([sum(layer.weight.nbytes for layer in group) for group in groups])
    enough = int((sizes < _TIMED_BYTES).sum()) + 1
    if enough > len(groups):
        return "onednn" if kernel is linear else "stored"
    weights = [torch.cat([layer.weight.detach() for layer in group]) for group in groups[:enough]]
    inputs = {w.shape[1]: torch.ones(rows, w.shape[1], dtype=w.dtype) for w in weights}
    packed = [_reordered(w, rows) for w in weights]

    def seconds(product: Product, layout: Sequence[Tensor]) -> float:
        started = time.perf_counter()
        for weight, form in zip(weights, layout, strict=True):
            product(inputs[weight.shape[1]], form, None)
        return time.perf_counter() - started

    stored_s, packed_s = [], []
    for _ in range(4):  # in turns, so that what else runs here slows both; the first ones pay for what is set up once
        stored_s.append(seconds(kernel, weights))
        packed_s.append(seconds(_packed_product, packed))
    share = _SURELY if kernel is linear else 1.0 / _SURELY
    return "stored" if min(stored_s[1:]) < share * min(packed_s[1:]) else "onednn"


def _reordered(weight: Tensor, rows: int) -> Tensor:
    """[out, in] in oneDNN's layout, chosen for `rows` rows of input."""
    found: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return found


def _packed_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`linear` for a weight in oneDNN's layout."""
    found: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    return found


def _fits(layer: nn.Linear, kernel: Product) -> bool:
    weight = layer.weight
    if weight.requires_grad or weight.device.type != "cpu":
        return False
    return can_pack(weight.dtype) or (kernel is not linear and weight.dtype in (torch.float32, torch.bfloat16))


def _groups(children: dict[str, nn.Linear]) -> list[tuple[str, ...]]:
    """The children by name, siblings together where they can be stacked."""
    found: list[tuple[str, ...]] = []
    for names in sibling_groups(children):
        layers = [children[name] for name in names]
        kinds = {(layer.in_features, layer.weight.dtype, layer.bias is None) for layer in layers}
        found += [names] if len(kinds) == 1 else [(name,) for name in names]
    return found
