"""What every learned part of a draft has in common: named float32 tensors, day-0 values, refresh, fold.

A part exists in two forms with the same tensors: the training form leaves the base modules as they are and adds the
learned ones beside them; the serving form keeps one dense weight that `refresh` recomputes from pristine base and
learned tensors. Serving storage is allocated once, so graphs captured over it stay valid.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn


class Part(ABC):
    """One group of learned tensors and its place in the model.

    Attributes:
      parameters: the learned tensors by their name in a checkpoint, float32, in a fixed order.
      random: those names whose day-0 value is random; the others start at zero.
      matrices: those names that map one hidden space to another at full rank: what Muon is made for.
    """

    def __init__(self) -> None:
        self.parameters: dict[str, nn.Parameter] = {}
        self.random: set[str] = set()
        self.matrices: set[str] = set()

    def add(self, name: str, parameter: nn.Parameter, *, random: bool = False, matrix: bool = False) -> nn.Parameter:
        """Register a learned tensor."""
        if matrix:
            self.matrices.add(name)
        self.parameters[name] = parameter
        if random:
            self.random.add(name)
        return parameter

    @torch.no_grad()
    def reset(self, seed: int) -> None:
        """Day-0 values, the same in every process for one seed and one set of names and shapes."""
        for name, parameter in self.parameters.items():
            if name in self.random:
                parameter.copy_(_uniform(name, parameter.shape, seed))
            else:
                parameter.zero_()

    @abstractmethod
    def refresh(self) -> None:
        """Make the forward pass follow the learned tensors; does nothing in the training form."""

    @abstractmethod
    def fold_into(self, state: dict[str, Tensor], config: Any) -> None:
        """Write this part into a plain model's state and configuration.

        Raises:
          ConfigError: no plain model computes this part.
        """


def learned(*shape: int, device: torch.device) -> nn.Parameter:
    """A float32 tensor to be learned; it requires gradients only once its owner says so."""
    return nn.Parameter(torch.zeros(shape, dtype=torch.float32, device=device), requires_grad=False)


def _uniform(name: str, shape: torch.Size, seed: int) -> Tensor:
    """Uniform within 1/sqrt(fan-in), torch's own for linear layers; drawn per name, so no order of creation matters."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return (torch.rand(shape, generator=generator) * 2 - 1) / math.sqrt(shape[-1])
