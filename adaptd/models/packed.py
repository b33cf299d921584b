"""Linear layers of a frozen model in the layout that the CPU's matrix kernels read.

A round multiplies a handful of rows with every weight of the target, so it costs what reading the weights costs, if the
kernel reads them well. `torch.nn.functional.linear` takes the weight as it is stored: in float32 a library routine that
slows down by half or more between one row and five, in bfloat16 a kernel that brings the weight into its own layout at
each call. oneDNN's layout, made once, is read two to three times as fast, and five rows cost what one costs.

Only for weights that never change: a draft is swapped in place, and a copy in another layout would not follow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

#: Layers with fewer weights gain less than the call costs.
_LEAST = 1 << 16


class PackedLinear(nn.Module):
    """The linear layer `layer`, whose weight it does not keep.

    Args:
      layer: frozen, on the CPU.
      rows: input rows the layout is chosen for; others are computed as exactly.
    """

    def __init__(self, layer: nn.Linear, rows: int) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())
        self.bias: Tensor | None
        # Neither a parameter nor a buffer: a tensor without strides can be neither cast nor saved.
        self._packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), rows)
        self._kernel: Callable[..., Tensor] = torch.ops.mkldnn._linear_pointwise.default

    @property
    def weight(self) -> Tensor:
        """[out, in], unpacked at each call."""
        return self._packed.to_dense()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        # A model is known by its weights (`weights_id`), in whatever layout they are.
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.weight

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        return self._kernel(x, self._packed, self.bias, "none", [], "")


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this build and processor have the kernels for that precision."""
    ops: Any = torch.ops.mkldnn
    if not torch.backends.mkldnn.is_available() or not hasattr(ops, "_linear_pointwise"):
        return False
    return dtype is torch.float32 or (dtype is torch.bfloat16 and bool(ops._is_mkldnn_bf16_supported()))


def pack_linears(model: nn.Module, *, rows: int) -> int:
    """Replaces the large linear layers of a frozen model, in place; their weights are freed where nothing else has them.

    Nothing happens on another device than the CPU, or where `can_pack` says no.

    Args:
      rows: of the input that is to be fast, for example k + 1 at batch 1.
    Returns: layers replaced.
    """
    found = 0
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is not nn.Linear or layer.weight.numel() < _LEAST:
                continue
            if layer.weight.requires_grad or layer.weight.device.type != "cpu" or not can_pack(layer.weight.dtype):
                continue
            setattr(parent, name, PackedLinear(layer, rows))
            found += 1
    return found
