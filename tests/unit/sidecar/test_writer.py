"""Update files: what travels of a version, and what its gate promised of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from adaptd.errors import ConfigError
from adaptd.models.scope import AdaptedDraft, ScopeConfig
from adaptd.sidecar.kinds import KINDS, NEVER, draft_kind
from adaptd.sidecar.update import Promise
from adaptd.sidecar.vllm_update import FUSED, SHARED, check_update
from adaptd.sidecar.writer import UpdateWriter
from checkpoints.errors import CheckpointNotFound, CorruptCheckpoint, IncompatibleCheckpoint
from checkpoints.store import CheckpointStore
from tests.unit.learning.conftest import tiny

PLAIN = ScopeConfig(width=8, gated=False, head_rank=0, embed_rank=0)


class Setting:
    """A store with one learned version, and a writer for it."""

    def __init__(self, home: Path, scope: ScopeConfig = PLAIN) -> None:
        self.draft = AdaptedDraft(tiny(0), scope)
        self.store = CheckpointStore(home / "checkpoints")
        self.folder = home / "updates"
        self.writer = UpdateWriter(self.draft, self.store, self.folder, "tok")

    def publish(self, shift: float = 0.1, **gate: Any) -> int:
        return self.store.publish(
            {name: torch.full_like(t, shift) for name, t in self.draft.state().items()},
            base_id=self.draft.base_id,
            tokenizer_hash="tok",
            scope=self.draft.scope,
            scope_config=self.draft.scope_config,
            gate=gate,
            window={},
            config={},
        ).version


def test_day_0_and_a_version_send_the_same_names_and_other_values(tmp_path: Path) -> None:
    setting = Setting(tmp_path)
    update, day_0 = setting.writer.write(setting.publish()), setting.writer.write(0)
    sent, base = load_file(update.file.path), load_file(day_0.file.path)
    assert sent.keys() == base.keys()
    assert update.content != day_0.content
    down = "model.layers.0.mlp.down_proj.weight"
    assert not base[down][:, -8:].any()
    assert sent[down][:, -8:].allclose(torch.tensor(0.1))
    known = {name: tuple(t.shape) for name, t in setting.draft.fold().state_dict().items()}
    check_update(sent, known)


def test_the_same_tensors_have_the_same_content_under_every_number(tmp_path: Path) -> None:
    setting = Setting(tmp_path)
    first = setting.publish()
    setting.publish(0.2)
    again = setting.store.rollback().version
    assert setting.writer.write(first).content == setting.writer.write(again).content


def test_lora_on_q_and_v_sends_k_too(tmp_path: Path) -> None:
    """vLLM fuses the three: k would be filled with garbage."""
    scope = ScopeConfig(scope="lora", lora_rank=2, lora_targets=["q_proj", "v_proj"])
    setting = Setting(tmp_path, scope)
    names = load_file(setting.writer.write(0).file.path)
    assert {name.split(".")[-2] for name in names} == {"q_proj", "k_proj", "v_proj"}


def test_a_promise_is_the_gates_and_names_the_incumbent(tmp_path: Path) -> None:
    setting = Setting(tmp_path)
    first = setting.publish(gain={"mean": 0.2, "low": 0.1, "high": 0.3})
    second = setting.publish(0.2, gain={"mean": 0.1, "low": 0.05, "high": 0.2})
    assert setting.writer.write(first).promise == Promise(0.1, 0)
    assert setting.writer.write(second).promise == Promise(0.05, first)
    restored = setting.store.rollback().version
    assert setting.writer.write(restored).promise == Promise(), "the gate compared it with another incumbent"


def test_only_the_two_newest_files_stay(tmp_path: Path) -> None:
    setting = Setting(tmp_path)
    versions = [setting.publish(0.1 * n) for n in range(1, 4)]
    for version in versions:
        setting.writer.write(version)
    assert sorted(p.name for p in setting.folder.iterdir()) == ["v000002.safetensors", "v000003.safetensors"]


def test_a_version_that_is_damaged_missing_or_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    setting = Setting(tmp_path)
    version = setting.publish()
    with pytest.raises(CheckpointNotFound):
        setting.writer.write(9)
    other = UpdateWriter(setting.draft, setting.store, setting.folder, "other")
    with pytest.raises(IncompatibleCheckpoint):
        other.write(version)
    file = setting.store.root / f"v{version:06d}" / "draft.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CorruptCheckpoint):
        setting.writer.write(version)
    assert not list(setting.folder.glob("*"))


def test_a_scope_that_cannot_travel_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"adapt\.gated: false"):
        Setting(tmp_path, ScopeConfig(width=8))


def test_a_kind_that_cannot_be_adapted_names_the_one_that_can() -> None:
    for method in ("eagle", "eagle3", "ngram"):
        with pytest.raises(ConfigError, match="draft_model"):
            draft_kind(method)


def test_eagle_names_lose_the_prefix_that_the_loader_adds_and_the_shared_tensors() -> None:
    """Prefixed twice, a name is nobody's; a vocabulary map is read once at the start."""
    names = [
        "model.midlayer.mlp.up_proj.weight",
        "model.embed_tokens.weight",
        "lm_head.weight",
        "d2t",
        "model.fc.weight",
    ]
    assert KINDS["eagle3"].travelling(names) == {
        "model.midlayer.mlp.up_proj.weight": "midlayer.mlp.up_proj.weight",
        "model.fc.weight": "fc.weight",
    }
    assert KINDS["draft_model"].travelling(names[:2]) == {names[0]: names[0]}


def test_both_sides_agree_on_what_is_shared() -> None:
    """The server's side imports nothing of the daemon's, so the list exists twice."""
    assert SHARED == NEVER
    assert FUSED == (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
