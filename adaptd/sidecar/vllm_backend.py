"""vLLM's weight-transfer engine that reads an update from disk: imported by vLLM, in its own environment, only.

The file is verified in full before anything changes, and the whole change, from the first parameter set aside to the
last one put back, happens inside one `update_weights` call: between `start` and it the draft is as it was, and a session
that is abandoned there has done nothing. (vLLM's own engines dismantle the model at `start`.) Reloading goes through
vLLM's layerwise reload: on CPU and with quantisation the live weights are repacked, and a plain copy would not fit.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.logger import init_logger

from adaptd.sidecar.vllm_update import UpdateRefused, check_update, read_update, stored_shapes

#: Under vLLM's own name, so that its logging configuration writes it.
_logger = init_logger("vllm.adaptd")


@dataclass
class DiskInitInfo(WeightTransferInitInfo):
    """`folder`: where updates must lie; None: anywhere this process may read."""

    folder: str | None = None


@dataclass
class DiskUpdateInfo(WeightTransferUpdateInfo):
    """An update file by absolute path, and the sha256 of its bytes."""

    path: str
    sha256: str


class DiskWeightTransferEngine(WeightTransferEngine[DiskInitInfo, DiskUpdateInfo]):
    """Backend `adaptd_disk`. Every rank reads the whole file; vLLM's loaders take each rank's shard."""

    init_info_cls = DiskInitInfo
    update_info_cls = DiskUpdateInfo
    supports_draft_weight_update = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._folder: str | None = None
        self._shapes: dict[str, dict[str, tuple[int, ...]]] = {}

    def init_transfer_engine(self, init_info: DiskInitInfo) -> None:
        """Remember where updates may come from; there is nothing to connect."""
        if init_info.folder is not None and not os.path.isabs(init_info.folder):
            raise UpdateRefused(f"folder ({init_info.folder!r}) must be absolute")
        self._folder = init_info.folder

    def start_weight_update(self) -> None:
        """Refuse sessions on the target; nothing changes yet.

        Raises:
          UpdateRefused: the session is not on the draft: adaptd never changes a target.
        """
        if self.model is self._default_model:
            raise UpdateRefused("adaptd_disk updates drafts only: use /start_draft_weight_update")

    def receive_weights(self, update_info: DiskUpdateInfo) -> None:
        """Verify the file, then load it; a refusal leaves the draft as it was.

        Raises:
          UpdateRefused: see `adaptd.sidecar.vllm_update`.
        """
        tensors = read_update(update_info.path, update_info.sha256, self._folder)
        check_update(tensors, self._known(str(self.model_config.model)))
        self._load(tensors)
        _logger.info("adaptd: %d draft tensors from %s", len(tensors), os.path.basename(update_info.path))

    def finish_weight_update(self) -> None:
        """Nothing is left to do."""

    def shutdown(self) -> None:
        """Nothing is held."""

    def _known(self, model: str) -> dict[str, tuple[int, ...]]:
        if model not in self._shapes:
            self._shapes[model] = stored_shapes(model if os.path.isdir(model) else _snapshot(model))
        return self._shapes[model]

    def _load(self, tensors: dict[str, Tensor]) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

        try:
            initialize_layerwise_reload(self.model)
            self.model.load_weights((name, tensor.to(self.device)) for name, tensor in tensors.items())
        except BaseException:
            _forget_half_loaded(self.model)
            raise
        finally:
            finalize_layerwise_reload(self.model, self.model_config)


def _forget_half_loaded(model: nn.Module) -> None:
    """Modules that received only a part get their old tensors back when reloading is finalised.

    Those that were complete are new already: the publisher brings the previous version back.
    """
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    for layer in model.modules():
        info = get_layerwise_info(layer)
        info.loaded_weights.clear()
        info.load_numel = 0


def _snapshot(model: str) -> str:
    """The local copy of a Hugging Face repository that the server loaded its draft from."""
    from huggingface_hub import snapshot_download

    return str(snapshot_download(model, allow_patterns=["*.safetensors"], local_files_only=True))
