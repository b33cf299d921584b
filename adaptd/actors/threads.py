"""CPU budget of an actor's process."""

from __future__ import annotations

import os

import torch


def set_threads(threads: int, niceness: int = 0) -> None:
    """Bound torch to `threads` CPU threads; `niceness` lowers the process's priority (0 leaves it)."""
    torch.set_num_threads(threads)
    if niceness:
        os.nice(niceness)
