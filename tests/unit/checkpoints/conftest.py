"""A tiny draft state and a store around it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from checkpoints.manifest import Manifest
from checkpoints.store import CheckpointStore

PROVENANCE: dict[str, Any] = {
    "base_id": "b" * 64,
    "tokenizer_hash": "t" * 64,
    "scope": "lora",
    "scope_config": {"rank": 8, "targets": ("q_proj", "v_proj")},
    "gate": {"gain": {"mean": 0.1, "low": 0.05, "high": 0.15}},
    "window": {"first_key": 1, "last_key": 9},
    "config": {"learning_rate": 1e-3},
}


def make_state(seed: int) -> dict[str, Tensor]:
    """Five small tensors of several dtypes and shapes, one of them a scalar and one empty."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "layers.0.lora_A": torch.randn(4, 16, generator=generator),
        "layers.0.lora_B": torch.randn(16, 4, generator=generator).to(torch.bfloat16),
        "head.bias": torch.randn(7, generator=generator).to(torch.float16),
        "gate": torch.randn((), generator=generator),
        "empty": torch.zeros(0, 3),
    }


@pytest.fixture
def state() -> Callable[[int], dict[str, Tensor]]:
    return make_state


@pytest.fixture
def provenance() -> dict[str, Any]:
    return dict(PROVENANCE)


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", lock_timeout_s=0.2, clock=lambda: 1_700_000_000.5)


@pytest.fixture
def publish(store: CheckpointStore) -> Callable[..., Manifest]:
    """`publish(seed)` publishes the state of that seed; keyword arguments override the provenance."""

    def publish_seed(seed: int, **overrides: Any) -> Manifest:
        return store.publish(make_state(seed), **{**PROVENANCE, **overrides})

    return publish_seed


@pytest.fixture
def same() -> Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], bool]:
    """Whether two states have the same names, dtypes and bits."""

    def compare(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
        return left.keys() == right.keys() and all(
            left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
        )

    return compare
