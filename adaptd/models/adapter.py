"""LoRA adapters of a target in the folder format of peft: loaded, they are merged, so that decoding sees one plain model.

An adapter folder holds `adapter_config.json` and `adapter_model.safetensors`. Its base is what the configuration names: a
folder beside it (`../target`), or any folder or Hugging Face name.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import PreTrainedModel

from adaptd.errors import ConfigError

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def is_adapter(path: str | Path) -> bool:
    """Whether this is a folder with an adapter in it and no whole model."""
    folder = Path(path)
    return (folder / _CONFIG).is_file() and not (folder / "config.json").is_file()


def base_of(path: str | Path) -> str:
    """The folder or Hugging Face name of the model that an adapter changes; of anything else, the path itself.

    Raises:
      ConfigError: the adapter does not name its base.
    """
    if not is_adapter(path):
        return str(path)
    config = Path(path) / _CONFIG
    try:
        name = json.loads(config.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as exc:
        raise ConfigError(f"{config} does not name its base: set base_model_name_or_path") from exc
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{config}: base_model_name_or_path ({name!r}) must be a folder or a Hugging Face name")
    beside = Path(path) / name
    return str(beside.resolve()) if beside.is_dir() else name


def merged(base: PreTrainedModel, path: str | Path) -> PreTrainedModel:
    """The base with the adapter's deltas added to its weights; done in the base's precision.

    Raises:
      ConfigError: the folder has no safetensors weights, or they do not fit the base.
    """
    # Imported here: peft takes seconds to import, and few targets are adapters.
    from peft import (
        PeftConfig,
        get_peft_model,
        get_peft_model_state_dict,
        load_peft_weights,
        set_peft_model_state_dict,
    )

    if not (Path(path) / _WEIGHTS).is_file():
        # peft would look for a pickled file next.
        raise ConfigError(f"{path} has no {_WEIGHTS}: save the adapter with safe serialization")
    try:
        with _quiet():
            config = PeftConfig.from_pretrained(str(path))
            config.base_model_name_or_path = base.name_or_path  # or peft warns of a change
            adapted = get_peft_model(base, config)
            weights = load_peft_weights(str(path), device="cpu")
            # peft itself leaves out what has no place and keeps at zero what is missing.
            strange = sorted(weights.keys() ^ get_peft_model_state_dict(adapted, save_embedding_layers=False).keys())
            if strange:
                raise ValueError(f"{len(strange)} tensors have no counterpart, the first is {strange[0]}")
            set_peft_model_state_dict(adapted, weights)
    except (OSError, ValueError, RuntimeError) as exc:
        reason = str(exc).strip().split("\n")[0]
        raise ConfigError(f"the adapter in {path} does not fit its base {base_of(path)!r}: {reason}") from exc
    whole: PreTrainedModel = adapted.merge_and_unload()
    return whole


class TrainedAdapter:
    """LoRA of one rank on every linear layer but the head, in place in `base`, with all else frozen.

    Args:
      base: stays usable as it is; its forward pass now has the adapter in it.
      alpha: the delta is (alpha / rank) B A.
    """

    def __init__(self, base: PreTrainedModel, rank: int, alpha: int) -> None:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")
        with _quiet():
            self._model = get_peft_model(base, config)

    def parameters(self) -> list[torch.nn.Parameter]:
        """What is trained."""
        return [p for p in self._model.parameters() if p.requires_grad]

    def save(self, folder: Path, base_name: str) -> None:
        """Write the adapter in bfloat16, naming its base as `base_name`."""
        for parameter in self.parameters():
            parameter.data = parameter.data.bfloat16()
        self._model.peft_config["default"].base_model_name_or_path = base_name
        # Not "auto", for which peft looks the base up on the hub.
        self._model.save_pretrained(str(folder), save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # peft's empty model card


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warning that peft 0.21 reads a name which transformers deprecates: nothing a user could do."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        yield
