"""A draft at one version in the form that other engines load: a plain model, and which of its tensors move.

An engine that is running takes new values, not new shapes. So it starts from the *prepared* draft, day 0 already widened
by a zero expert, and each later version is the same names and shapes with other values in the tensors that move.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from adaptd.errors import ConfigError
from adaptd.models.load import load_tokenizer
from adaptd.models.scope import AdaptedDraft, ScopeConfig
from checkpoints.export import whole_folder

#: Written into every exported folder: where it comes from.
PROVENANCE = "adaptd.json"

#: What a base folder holds beside the tokenizer: written anew, or not to be carried along.
_NOT_COPIED = ("config.json", "generation_config.json", "*.safetensors", "*.bin", "*.index.json", "*.pt", "*.md", ".*")


def fold(draft: AdaptedDraft, tensors: Mapping[str, Tensor], *, untied: bool = False) -> PreTrainedModel:
    """The plain model of one version; the draft is left at that version.

    Args:
      tensors: the checkpoint's; none mean day 0.
      untied: give the head its own weight where it shares the embedding's.

    Raises:
      ConfigError: the scope is gated or has a head bias; the message names the setting to change.
    """
    draft.load(tensors)
    model = draft.fold()
    if untied:
        untie(model)
    return model


@torch.no_grad()
def untie(model: PreTrainedModel) -> None:
    """Give the head its own copy of a weight it shares with the embedding: an engine then holds two tensors."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.get_parameter("weight") is embedding.get_parameter("weight"):
        copy = head.get_parameter("weight").detach().clone()
        head.register_parameter("weight", nn.Parameter(copy, requires_grad=False))
    model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}


def moving(draft: AdaptedDraft, names: Iterable[str]) -> list[str]:
    """The names, of a folded model's tensors, whose values a version may change: every tensor of each touched module.

    A learned tensor belongs to the module with the longest common name: `<ffn>.private.up.weight` to `<ffn>`.
    """
    listed = sorted(names)
    owners = {owner for learned in draft.trainable() if (owner := _owner(learned, listed))}
    return [name for name in listed if any(_within(name, owner) for owner in owners)]


def check_publishable(config: ScopeConfig) -> None:
    """Return if versions of this scope can be brought into a running engine.

    Raises:
      ConfigError: a gate has no place in a plain model; embedding or head learn, which an engine may share with the
        target, so that they never travel. The message names every setting to change.
    """
    changes = ["adapt.scope: private_expert or lora"] if config.scope == "full" else []
    if config.scope == "private_expert" and config.gated:
        changes.append("adapt.gated: false")
    if config.request_gate:
        changes.append("adapt.request_gate: false")
    if config.effective_head_rank:
        changes.append("adapt.head_rank: 0")
    if config.effective_embed_rank:
        changes.append("adapt.embed_rank: 0")
    if changes:
        raise ConfigError(
            "a running engine takes plain layers only, and never an embedding or a head (it may share them with the "
            f"target), but this scope changes more: set {', '.join(changes)}"
        )


def moving_tensors(draft: AdaptedDraft, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What travels for one version: the moving tensors of its folded model. Also for day 0, which undoes any version.

    Raises:
      ConfigError: the scope cannot be folded, or embedding or head learn.
    """
    check_publishable(ScopeConfig(**draft.scope_config))
    state = fold(draft, tensors).state_dict()
    return {name: state[name] for name in moving(draft, state)}


def write_folder(
    out: Path, draft: AdaptedDraft, tensors: Mapping[str, Tensor], base: str, about: Mapping[str, Any], *, untied: bool
) -> Path:
    """Write a Hugging Face folder of one version: configuration, weights, the base's tokenizer, and `adaptd.json`.

    Args:
      base: folder or Hugging Face name of the base draft.
      about: provenance, plain JSON.

    Raises:
      ConfigError: as `fold`.
      StoreUnavailable: `out` is not empty, or cannot be written.
    """
    with whole_folder(out) as folder:
        fold(draft, tensors, untied=untied).save_pretrained(folder)
        if (source := Path(base)).is_dir():
            for path in sorted(source.iterdir()):
                if path.is_file() and not any(path.match(pattern) for pattern in _NOT_COPIED):
                    shutil.copyfile(path, folder / path.name)
        else:
            load_tokenizer(base).save_pretrained(folder)
        (folder / PROVENANCE).write_text(json.dumps(dict(about), indent=2) + "\n", encoding="utf-8")
    return out


def _owner(learned: str, names: list[str]) -> str:
    """The longest prefix of `learned` that is, or holds, a tensor of the folded model; empty if there is none."""
    parts = learned.split(".")
    for end in range(len(parts), 0, -1):
        prefix = ".".join(parts[:end])
        if any(_within(name, prefix) for name in names):
            return prefix
    return ""


def _within(name: str, place: str) -> bool:
    return name == place or name.startswith(f"{place}.")
