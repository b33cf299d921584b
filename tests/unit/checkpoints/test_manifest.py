"""The manifest reads back exactly what it wrote and refuses everything else by name."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from checkpoints.errors import CorruptCheckpoint
from checkpoints.manifest import Manifest, TensorSpec, plain, weights_id


@pytest.fixture
def manifest(provenance: dict[str, Any]) -> Manifest:
    fields = {**provenance, "scope_config": {"rank": 8}}
    return Manifest(
        version=3,
        parent=2,
        tensors=(TensorSpec("a", (2, 3), "float32", "0" * 64), TensorSpec("b", (), "bfloat16")),
        sha256="f" * 64,
        created_at=1.5,
        status="promoted",
        **fields,
    )


def test_a_manifest_survives_the_way_through_json(manifest: Manifest) -> None:
    assert Manifest.from_json(manifest.to_json()) == manifest
    assert Manifest.from_json(replace(manifest, parent=None, restored=0, note="x").to_json()).restored == 0


def test_the_size_counts_every_element_at_its_own_width(manifest: Manifest) -> None:
    assert manifest.bytes == 2 * 3 * 4 + 2


def test_only_a_manifest_without_tensors_means_back_to_day_0(manifest: Manifest) -> None:
    assert not manifest.is_reset
    assert replace(manifest, tensors=()).is_reset


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema": 2}, "schema"),
        ({"version": "3"}, "version is a str"),
        ({"version": True}, "version is a bool"),
        ({"version": 0}, "at least 1"),
        ({"parent": "2"}, "parent is a str"),
        ({"status": "done"}, "none of candidate"),
        ({"surprise": 1}, "unknown key surprise"),
        ({"tensors": {}}, "tensors is not a list"),
        ({"tensors": [{"name": "a", "shape": [2], "dtype": "float32"}]}, "lacks sha256"),
        ({"tensors": [{"name": "a", "shape": [-2], "dtype": "float32", "sha256": None}]}, "shape of a"),
        ({"tensors": [{"name": "a", "shape": [True], "dtype": "float32", "sha256": None}]}, "shape of a"),
        ({"tensors": [{"name": "a", "shape": [2], "dtype": "object", "sha256": None}]}, "dtype of a"),
        ({"tensors": [{"name": "a", "shape": [2], "dtype": ["x"], "sha256": None}]}, "dtype of a"),
    ],
)
def test_a_manifest_with_a_wrong_value_is_refused_and_the_value_named(
    manifest: Manifest, change: dict[str, Any], words: str
) -> None:
    text = json.dumps({**json.loads(manifest.to_json()), **change})
    with pytest.raises(CorruptCheckpoint, match=words) as refused:
        Manifest.from_json(text)
    assert refused.value.reason == "manifest"


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"schema": 1}', "[" * 100_000])
def test_a_manifest_that_is_no_manifest_is_refused(text: str) -> None:
    with pytest.raises(CorruptCheckpoint):
        Manifest.from_json(text)


def test_every_absent_key_is_refused_by_name(manifest: Manifest) -> None:
    raw = json.loads(manifest.to_json())
    for key in raw.keys() - {"schema"}:
        with pytest.raises(CorruptCheckpoint, match=f"lacks {key}"):
            Manifest.from_json(json.dumps({k: v for k, v in raw.items() if k != key}))


def test_plain_turns_numbers_of_numpy_and_torch_into_json_and_nan_into_null() -> None:
    value = {"a": np.float32(0.5), "b": (np.int64(3), torch.tensor(2)), "c": np.nan, "d": [float("inf"), True, None]}
    assert plain(value, "gate") == {"a": 0.5, "b": [3, 2], "c": None, "d": [None, True, None]}


def test_plain_names_the_path_of_a_value_without_a_json_form() -> None:
    with pytest.raises(ValueError, match=r"gate\.by\[1\] \(ndarray\)"):
        plain({"by": [1, np.zeros(3)]}, "gate")


def test_the_identity_of_weights_ignores_order_and_strides_but_not_names_dtypes_shapes_or_bits() -> None:
    a, b = torch.arange(6.0).reshape(2, 3), torch.ones(2)
    first = weights_id({"a": a, "b": b})
    assert weights_id({"b": b, "a": a.t().contiguous().t()}) == first
    others = [
        {"a": a, "c": b},
        {"a": a.reshape(3, 2), "b": b},
        {"a": a.to(torch.float64), "b": b},
        {"a": a, "b": torch.nextafter(b, b + 1)},
        {"a": a},
    ]
    assert len({first, *(weights_id(other) for other in others)}) == 6


def test_listing_manifests_loads_no_torch() -> None:
    """`adaptd checkpoints list` has to answer at once; importing torch takes seconds."""
    code = "import sys, checkpoints.store, checkpoints.manifest; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
