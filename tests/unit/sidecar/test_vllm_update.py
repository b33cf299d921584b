"""What the server makes of an update before any weight changes."""

import hashlib
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from adaptd.sidecar.vllm_update import UpdateRefused, check_update, read_update, stored_shapes, whole

Q, K, V = (f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkv")
DOWN = "model.layers.0.mlp.down_proj.weight"
KNOWN = {Q: (4, 4), K: (2, 4), V: (2, 4), DOWN: (4, 8), "lm_head.weight": (9, 4), "model.embed_tokens.weight": (9, 4)}


def written(folder: Path, tensors: dict[str, torch.Tensor]) -> tuple[str, str]:
    data = save(tensors)
    path = folder / "v000001.safetensors"
    path.write_bytes(data)
    return str(path), hashlib.sha256(data).hexdigest()


def filled(*names: str) -> dict[str, torch.Tensor]:
    return {name: torch.ones(KNOWN[name]) for name in names}


def test_a_file_as_announced_is_read(tmp_path: Path) -> None:
    path, digest = written(tmp_path, filled(DOWN))
    found = read_update(path, digest, str(tmp_path))
    assert torch.equal(found[DOWN], torch.ones(4, 8))


def test_other_bytes_than_announced_are_refused_before_they_are_parsed(tmp_path: Path) -> None:
    path, digest = written(tmp_path, filled(DOWN))
    Path(path).write_bytes(Path(path).read_bytes()[:-1])
    with pytest.raises(UpdateRefused, match="truncated or overwritten"):
        read_update(path, digest, None)


def test_bytes_that_are_no_safetensors_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"\x80\x04pickle")
    with pytest.raises(UpdateRefused, match="not a safetensors file"):
        read_update(str(path), hashlib.sha256(path.read_bytes()).hexdigest(), None)


def test_a_value_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    path, digest = written(tmp_path, {DOWN: torch.tensor([[float("nan")]])})
    with pytest.raises(UpdateRefused, match=r"down_proj\.weight holds NaN"):
        read_update(path, digest, None)


def test_a_relative_path_is_refused() -> None:
    with pytest.raises(UpdateRefused, match="must be absolute"):
        read_update("v1.safetensors", "", None)


def test_a_missing_file_names_the_shared_folder_as_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(UpdateRefused, match="must share this folder"):
        read_update(str(tmp_path / "gone"), "", None)


def test_a_named_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UpdateRefused, match="regular file"):
        read_update(str(tmp_path / "pipe"), "", None)


def test_a_link_that_leads_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "folder").mkdir()
    path, digest = written(tmp_path / "outside", filled(DOWN))
    link = tmp_path / "folder" / "link"
    link.symlink_to(path)
    with pytest.raises(UpdateRefused, match="must lie in"):
        read_update(str(link), digest, str(tmp_path / "folder"))


def test_whole_modules_of_known_names_and_shapes_pass() -> None:
    check_update(filled(Q, K, V, DOWN), KNOWN)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "at least one"),
        (filled(Q, V), "missing, first .*k_proj"),
        ({"model.layers.9.mlp.down_proj.weight": torch.ones(1)}, "no tensor of the draft"),
        ({DOWN: torch.ones(4, 9)}, r"\(4, 9\) where this server's draft has \(4, 8\)"),
        (filled("lm_head.weight"), "may be shared with the target"),
        (filled("model.embed_tokens.weight"), "may be shared with the target"),
    ],
)
def test_what_the_draft_cannot_take_whole_is_refused(tensors: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(UpdateRefused, match=message):
        check_update(tensors, KNOWN)


def test_a_module_with_a_bias_is_half_sent_without_it() -> None:
    known = {**KNOWN, K.replace("weight", "bias"): (2,)}
    assert whole([Q], known) == {Q, K, V, K.replace("weight", "bias")}
    with pytest.raises(UpdateRefused, match=r"k_proj\.bias"):
        check_update(filled(Q, K, V), known)


def test_names_and_shapes_come_from_the_headers_of_every_shard(tmp_path: Path) -> None:
    (tmp_path / "model-00001.safetensors").write_bytes(save(filled(Q)))
    (tmp_path / "model-00002.safetensors").write_bytes(save(filled(DOWN)))
    assert stored_shapes(tmp_path) == {Q: (4, 4), DOWN: (4, 8)}
    with pytest.raises(UpdateRefused, match="no safetensors file"):
        stored_shapes(tmp_path / "nowhere")
    (tmp_path / "model-00003.safetensors").write_bytes(b"\xff" * 16)
    with pytest.raises(UpdateRefused, match="no readable header"):
        stored_shapes(tmp_path)
