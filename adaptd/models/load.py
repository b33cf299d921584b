"""Loading models and tokenizers, and the checks that two of them speak of the same tokens.

Knows nothing about adaptation. Only safetensors files are read; code that ships with a model is never run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as hf_logging

from adaptd.errors import ConfigError, VocabularyMismatch
from adaptd.models.adapter import base_of, is_adapter, merged
from checkpoints import manifest

Role = Literal["target", "draft"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class LoadedDraft(NamedTuple):
    """A base draft and the identity of its weights as stored on disk, whatever precision they now run in."""

    model: PreTrainedModel
    base_id: str


def resolve(name: str, role: Role) -> str:
    """The folder or Hugging Face name to load: `pocket` is the shipped model of that role, `pocket-math` the tuned target.

    Raises:
      ConfigError: the pocket folder was not shipped, it is of the other role, or `name` is written as a path and is no folder.
    """
    if name == "pocket":
        return _shipped(role, "config.json", "build")
    if name == "pocket-math":
        if role != "target":
            raise ConfigError(f"{role} model {name!r} is a target: use `pocket`")
        return _shipped("target_math", "adapter_config.json", "tune")
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    if name.startswith(("/", "./", "../", "~")):
        raise ConfigError(f"{role} model {name!r} is no folder: give a folder, a Hugging Face name or `pocket`")
    return name


def _shipped(part: str, marker: str, maker: str) -> str:
    folder = Path(str(files("adaptd.pocket"))) / part
    if not (folder / marker).is_file():
        raise ConfigError(
            f"the pocket {part} is not in {folder}: install the wheel, or run `python -m adaptd.pocket.{maker}`"
        )
    return str(folder)


def load_causal_lm(path: str | Path, *, dtype: str, device: str) -> PreTrainedModel:
    """A causal language model in eval mode, with nothing requiring gradients.

    Args:
      path: a folder or Hugging Face name; see `resolve` for `pocket`. A folder with a LoRA adapter in the format of peft
        stands for its base with the adapter merged.
      dtype: `float32`, `bfloat16`, `float16`, or `auto` for the precision on disk.
      device: a torch device, or `auto` for CUDA where there is one.

    Raises:
      ConfigError: unknown `dtype` or `device`, or the model cannot be loaded.
    """
    return _place(_load(path), dtype, device)


def model_limits(path: str | Path) -> tuple[int, int]:
    """Context length and vocabulary size of a model, from its configuration alone.

    Raises:
      ConfigError: it cannot be loaded.
    """
    try:
        config = AutoConfig.from_pretrained(base_of(path))
    except (OSError, ValueError) as exc:
        raise ConfigError(f"no model configuration could be loaded from {str(path)!r}: {_first_line(exc)}") from exc
    text = config.get_text_config()
    return int(text.max_position_embeddings), int(text.vocab_size)


def load_draft(path: str | Path, *, dtype: str, device: str) -> LoadedDraft:
    """Like `load_causal_lm`, with `base_id`: equal for a learner in float32 and a decoder in bfloat16 of one draft."""
    model = _load(path)
    base_id = weights_id(model)
    return LoadedDraft(_place(model, dtype, device), base_id)


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or Hugging Face name; an adapter has its base's.

    Raises:
      ConfigError: it cannot be loaded.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(base_of(path))
    except (OSError, ValueError) as exc:
        raise ConfigError(f"no tokenizer could be loaded from {str(path)!r}: {_first_line(exc)}") from exc
    return tokenizer


def check_same_vocabulary(
    target: nn.Module,
    draft: nn.Module,
    target_tokenizer: PreTrainedTokenizerBase,
    draft_tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Return if a token id means the same to both models.

    Raises:
      VocabularyMismatch: the logits have another width (both widths are named), or an id stands for another token (the
        first such id and both tokens are named), or a token has no logit.
    """
    target_tokens, draft_tokens = _tokens(target_tokenizer), _tokens(draft_tokenizer)
    target_size, draft_size = vocab_size(target), vocab_size(draft)
    for token_id in sorted(target_tokens.keys() | draft_tokens.keys()):
        ours, theirs = target_tokens.get(token_id), draft_tokens.get(token_id)
        if ours != theirs:
            raise VocabularyMismatch(
                f"token {token_id} is {ours!r} to the target and {theirs!r} to the draft "
                f"({len(target_tokens)} and {len(draft_tokens)} tokens): use a draft with the target's tokenizer"
            )
    if target_size != draft_size:
        raise VocabularyMismatch(
            f"the target has {target_size} logits and the draft {draft_size}, though the tokenizers agree: "
            "resize the smaller model's embeddings and head to the same vocabulary size"
        )
    highest = max(target_tokens, default=-1)
    if highest >= target_size:
        raise VocabularyMismatch(
            f"the tokenizers know token {highest}, the models have {target_size} logits: they are another model's"
        )


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of the table from token id to token, special and added tokens included; nothing else of the tokenizer."""
    table = json.dumps(sorted(_tokens(tokenizer).items()), ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(table.encode()).hexdigest()


def weights_id(module_or_state: nn.Module | Mapping[str, Tensor]) -> str:
    """`checkpoints.manifest.weights_id` of a module or of a state dictionary: which weights these are."""
    state = module_or_state.state_dict() if isinstance(module_or_state, nn.Module) else module_or_state
    return manifest.weights_id({name: tensor.detach() for name, tensor in state.items()})


def vocab_size(model: nn.Module) -> int:
    """Width V of a model's logits, padding rows included."""
    config: Any = model.config
    return int(config.get_text_config().vocab_size)


def cast_parameters(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast the parameters in place, and only them.

    `Module.to(dtype)` would also round the rotary frequencies, which are buffers that must stay in float32.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype


def move(model: nn.Module, device: torch.device) -> None:
    """Move a model in place."""
    model.to(device)


def freeze(model: nn.Module) -> None:
    """Eval mode, nothing requires gradients."""
    model.eval()
    model.requires_grad_(False)


def _load(path: str | Path) -> PreTrainedModel:
    """The model in the precision on disk; an adapter is merged in that of its base."""
    hf_logging.disable_progress_bar()  # it would stand in the middle of tables and logs
    base = base_of(path)
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(base, dtype="auto", use_safetensors=True)
    except (OSError, ValueError) as exc:
        raise ConfigError(f"no causal language model could be loaded from {base!r}: {_first_line(exc)}") from exc
    return merged(model, path) if is_adapter(path) else model


def _place(model: PreTrainedModel, dtype: str, device: str) -> PreTrainedModel:
    if dtype != "auto":
        if dtype not in _DTYPES:
            raise ConfigError(f"dtype ({dtype!r}) must be one of {', '.join(_DTYPES)} or auto")
        cast_parameters(model, _DTYPES[dtype])
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        where = torch.device(device)
    except RuntimeError as exc:
        raise ConfigError(f"device ({device!r}) must be auto, cpu, cuda or cuda:N") from exc
    if where.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device ({device!r}) needs a CUDA device and this machine has none: use cpu or auto")
    move(model, where)
    freeze(model)
    return model


def _tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    return {token_id: token for token, token_id in tokenizer.get_vocab().items()}


def _first_line(exc: Exception) -> str:
    return str(exc).strip().split("\n")[0]
