"""`adaptd export`: a draft version as a plain Hugging Face folder, or day 0 prepared for an engine with fixed shapes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adaptd import __version__
from adaptd.actors.parts import load_draft
from adaptd.config import Config
from adaptd.errors import AdaptdError
from adaptd.models import fold, load
from adaptd.models.scope import ScopeConfig
from checkpoints.errors import CheckpointError
from checkpoints.store import CheckpointStore


def run(config: Config, out: Path, *, version: int | None, prepare: bool, dtype: str) -> dict[str, Any]:
    """Write the folder.

    Args:
      out: a new or empty folder.
      version: 0 is day 0; None the live one.
      prepare: day 0 with an untied head, refused where later versions could not be brought into a running engine.
      dtype: precision of the tensors; `auto` is that of the base on disk.

    Returns: what was written: `path`, `version`, `dtype`, `parameters`.
    Raises:
      ConfigError: the scope cannot be folded, or (prepare) not be published; the message names the setting.
      AdaptdError: there is no such version, it does not fit, or `out` cannot be written.
    """
    if prepare:
        fold.check_publishable(ScopeConfig(**config.adapt.model_dump(), seed=config.seed))
    draft, identity = load_draft(config, "cpu", dtype, serving=False)
    base = load.resolve(config.draft.model, "draft")
    try:
        store = CheckpointStore(config.home / "checkpoints")
        number = 0 if prepare else (store.current() or 0) if version is None else version
        tensors: Mapping[str, Any] = {}
        if number:
            manifest, tensors = store.load(number)
            if manifest.base_id != identity.base_id:
                raise AdaptdError(
                    f"version {number} adapts the base draft {manifest.base_id[:12]} but {base} is "
                    f"{identity.base_id[:12]}: set draft.model to that draft"
                )
        about = {
            "adaptd_version": __version__,
            "version": number,
            "prepared": prepare,
            "base_id": identity.base_id,
            "tokenizer_hash": identity.tokenizer_hash,
            "scope_config": identity.scope_config,
        }
        try:
            fold.write_folder(out, draft, tensors, base, about, untied=prepare)
        except ValueError as error:
            raise AdaptdError(
                f"version {number} was made with another adapt configuration ({error}): use that configuration"
            ) from error
    except CheckpointError as error:
        raise AdaptdError(str(error)) from error
    size = sum(p.numel() for p in load.load_causal_lm(out, dtype="auto", device="cpu").parameters())
    return {"path": str(out), "version": number, "prepared": prepare, "parameters": size}
