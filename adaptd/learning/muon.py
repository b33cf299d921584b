"""Muon (Jordan et al. 2024) in float32: momentum whose matrix is made orthogonal before it is applied.

Every direction of a matrix then moves alike, however small its gradient: what few traces say is learned in fewer steps.
`torch.optim.Muon` does the same in bfloat16, which a CPU without bfloat16 units computes tens of times slower than this.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

#: Coefficients of the quintic Newton-Schulz iteration and its length, as published.
_A, _B, _C, _STEPS = 3.4445, -4.7750, 2.0315, 5


class Muon(torch.optim.Optimizer):
    """Muon over matrices, with Nesterov momentum and decoupled weight decay.

    An update has the root mean square that is usual for AdamW, 0.2 a unit of learning rate (Liu et al. 2025, equation 4),
    so one learning rate serves both.

    Args:
      parameters: two-dimensional each.
      lr: learning rate; may be changed in `param_groups`.
      weight_decay: decoupled.
      momentum: of the gradient.
    Raises: ValueError: a parameter is not two-dimensional.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], *, lr: float, weight_decay: float = 0.0, momentum: float = 0.95
    ) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim != 2:
                    raise ValueError(f"parameters must be two-dimensional, got {tuple(parameter.shape)}")

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # nobody evaluates the loss anew here
        """One update; parameters without a gradient stay. `closure` is not used."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                gradient, beta = parameter.grad, group["momentum"]
                momentum = state["momentum_buffer"].lerp_(gradient, 1 - beta)
                direction = orthogonal(gradient.lerp(momentum, beta))
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(direction, alpha=-group["lr"] * 0.2 * math.sqrt(max(parameter.shape)))


def orthogonal(matrix: Tensor) -> Tensor:
    """The nearest matrix with singular values of about one (0.7 to 1.2), [rows, columns], by Newton-Schulz iteration."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x: Tensor = wide / wide.norm().clamp_min(1e-7)
    for _ in range(_STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x if wide is matrix else x.T
