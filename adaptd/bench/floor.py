"""The time that no decoder can beat on this machine: weights read once a pass, or multiplications, whichever takes longer."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_REPEATS = 5
#: Bytes read to find the bandwidth: far more than any cache holds.
_BYTES = 1 << 29
_SIDE, _WIDTH = 1536, 1024


@dataclass(frozen=True, slots=True)
class Machine:
    """Measured rates, with the threads that torch has now."""

    bytes_per_s: float
    """Memory read."""
    flops_per_s: float
    """Of a large matrix product in the models' precision."""


def measure_machine(dtype: torch.dtype) -> Machine:
    """Read half a gigabyte, as a sum and as a matrix, and multiply two large ones: the fastest of five times each."""
    memory = torch.ones(_BYTES // 4)
    matrix, vector = memory.view(-1, _WIDTH), torch.ones(_WIDTH)
    read_s = min(_best(memory.sum), _best(lambda: matrix @ vector))
    square = torch.randn(_SIDE, _SIDE).to(dtype)
    return Machine(_BYTES / read_s, 2.0 * _SIDE**3 / _best(lambda: square @ square))


def _best(work: Callable[[], Tensor]) -> float:
    found = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        work()
        found.append(time.perf_counter() - started)
    return min(found)


def floor_s(machine: Machine, passes: list[tuple[nn.Module, int]]) -> float:
    """Seconds that a round takes at least.

    Args:
      passes: (model, positions in it, over all rows) of each forward pass of the round.
    """
    total = 0.0
    for model, positions in passes:
        weights = list(model.state_dict(keep_vars=True).values())
        unique = {id(w): w for w in weights}.values()
        size = sum(w.numel() * w.element_size() for w in unique)
        operations = 2.0 * positions * sum(w.numel() for w in unique)
        total += max(size / machine.bytes_per_s, operations / machine.flops_per_s)
    return total
