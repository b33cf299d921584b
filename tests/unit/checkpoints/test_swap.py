"""A swap arrives whole or not at all, and every refusal says why."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from checkpoints.errors import CheckpointError, CorruptCheckpoint, IncompatibleCheckpoint
from checkpoints.manifest import Manifest
from checkpoints.store import CheckpointStore
from checkpoints.swap import check, copy_in_place

BASE, TOKENIZER = "b" * 64, "t" * 64
Loaded = tuple[Manifest, dict[str, Tensor]]


@pytest.fixture
def loaded(store: CheckpointStore, publish: Callable[..., Manifest]) -> Loaded:
    publish(1)
    return store.load(1)


@pytest.fixture
def draft(state: Callable[[int], dict[str, Tensor]]) -> dict[str, nn.Parameter]:
    """The trainable tensors of the draft that decodes, at other values than the checkpoint's."""
    return {name: nn.Parameter(tensor) for name, tensor in state(2).items()}


def swap(draft: Mapping[str, Tensor], manifest: Manifest, tensors: Mapping[str, Tensor]) -> None:
    """What a decoder does."""
    check(manifest, tensors, draft, BASE, TOKENIZER)
    copy_in_place(draft, tensors, version=manifest.version)


def test_a_swap_writes_the_published_bits_into_the_same_storage(
    loaded: Loaded, draft: dict[str, nn.Parameter], same: Callable[..., bool]
) -> None:
    manifest, tensors = loaded
    before = {name: tensor.data_ptr() for name, tensor in draft.items()}
    check(manifest, tensors, draft, BASE, TOKENIZER)
    report = copy_in_place(draft, tensors, version=manifest.version)
    assert same(draft, tensors)
    assert {name: tensor.data_ptr() for name, tensor in draft.items()} == before
    assert all(parameter.requires_grad for parameter in draft.values())
    assert (report.version, report.tensors, report.bytes) == (1, 5, manifest.bytes)
    assert 0 < report.seconds < 1


def without(name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


def changed(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {**tensors, name: change(tensors[name])}


def with_value(value: float) -> Callable[[Tensor], Tensor]:
    def poison(tensor: Tensor) -> Tensor:
        poisoned = tensor.clone()
        poisoned.view(-1)[-1] = value
        return poisoned

    return poison


REFUSALS: dict[
    str, tuple[str, dict[str, Any], Callable[[dict[str, Tensor]], dict[str, Tensor]], type[CheckpointError]]
] = {
    "another base draft": ("base", {"base_id": "c" * 64}, dict, IncompatibleCheckpoint),
    "another tokenizer": ("tokenizer", {"tokenizer_hash": "u" * 64}, dict, IncompatibleCheckpoint),
    "a missing tensor": ("missing", {}, without("head.bias"), IncompatibleCheckpoint),
    "an extra tensor": ("unexpected", {}, lambda t: {**t, "extra": torch.zeros(1)}, IncompatibleCheckpoint),
    "a transposed tensor": ("shape", {}, changed("layers.0.lora_A", Tensor.t), IncompatibleCheckpoint),
    "a wider tensor": ("dtype", {}, changed("head.bias", Tensor.float), IncompatibleCheckpoint),
    "a NaN": ("not_finite", {}, changed("layers.0.lora_B", with_value(float("nan"))), CorruptCheckpoint),
    "an infinity": ("not_finite", {}, changed("gate", with_value(float("-inf"))), CorruptCheckpoint),
    "other bits": ("sha256", {}, changed("head.bias", lambda t: t + 1), CorruptCheckpoint),
    "a manifest without its tensors": ("manifest", {"tensors": ()}, dict, CorruptCheckpoint),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name_and_nothing_is_written(
    loaded: Loaded, draft: dict[str, nn.Parameter], same: Callable[..., bool], case: str
) -> None:
    reason, manifest_change, tensor_change, error = REFUSALS[case]
    manifest, tensors = loaded
    before = {name: tensor.detach().clone() for name, tensor in draft.items()}
    with pytest.raises(error) as refused:
        swap(draft, replace(manifest, **manifest_change), tensor_change(dict(tensors)))
    assert refused.value.reason == reason  # type: ignore[attr-defined]
    assert same(draft, before)
    swap(draft, manifest, tensors)
    assert same(draft, tensors)


@pytest.mark.parametrize("case", ["a missing tensor", "an extra tensor", "a transposed tensor", "a wider tensor"])
def test_the_copy_alone_refuses_a_misfit_before_its_first_write(
    loaded: Loaded, draft: dict[str, nn.Parameter], same: Callable[..., bool], case: str
) -> None:
    """The misfit may be the last tensor of many; a check inside the copy loop would leave a half swap."""
    before = {name: tensor.detach().clone() for name, tensor in draft.items()}
    with pytest.raises(IncompatibleCheckpoint):
        copy_in_place(draft, REFUSALS[case][2](dict(loaded[1])))
    assert same(draft, before)


def test_a_reset_version_passes_the_check_but_is_never_copied(
    store: CheckpointStore, loaded: Loaded, draft: dict[str, nn.Parameter]
) -> None:
    store.rollback()
    manifest, tensors = store.load(2)
    assert manifest.is_reset
    check(manifest, tensors, draft, BASE, TOKENIZER)
    with pytest.raises(IncompatibleCheckpoint, match="base draft"):
        check(manifest, tensors, draft, "c" * 64, TOKENIZER)
    with pytest.raises(IncompatibleCheckpoint, match="lacks"):
        copy_in_place(draft, tensors)


def test_a_manifest_without_tensor_digests_is_checked_by_everything_else(
    loaded: Loaded, draft: dict[str, nn.Parameter]
) -> None:
    manifest, tensors = loaded
    bare = replace(manifest, tensors=tuple(replace(spec, sha256=None) for spec in manifest.tensors))
    check(bare, tensors, draft, BASE, TOKENIZER)


def test_a_long_list_of_missing_tensors_is_shortened_in_the_message(loaded: Loaded) -> None:
    wide = {f"w{index}": torch.zeros(1) for index in range(10)}
    with pytest.raises(IncompatibleCheckpoint, match="w0, w1, w2 and 7 more"):
        copy_in_place(wide, {})
