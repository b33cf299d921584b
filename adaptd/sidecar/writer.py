"""Writes versions as update files: folds the checkpoint and keeps only the tensors that travel.

Needs the models and so belongs in a process that has them; the publisher only sees the files.
"""

from __future__ import annotations

import threading
from pathlib import Path

from torch import Tensor

from adaptd.models import fold
from adaptd.models.scope import AdaptedDraft, ScopeConfig
from adaptd.sidecar.kinds import DraftKind, draft_kind
from adaptd.sidecar.update import Promise, Update
from adaptd.sidecar.vllm_update import whole
from checkpoints.export import write_update
from checkpoints.manifest import Manifest
from checkpoints.store import CheckpointStore
from checkpoints.swap import check

#: Update files that stay: the serving version's, and the one before it for the way back.
_KEEP = 2


class UpdateWriter:
    """Owns the folder of update files, and a draft of its own to fold with. One call at a time.

    Args:
      draft: the adapted draft, in the training or serving form; left at the version written last.
      store: where versions come from.
      folder: for the files; the server must see it.
      tokenizer_hash: of the tokenizer in use, which checkpoints must match.
      method: vLLM's name for the kind of draft.

    Raises:
      ConfigError: versions of this draft cannot travel; the message names the settings to change.
    """

    def __init__(
        self,
        draft: AdaptedDraft,
        store: CheckpointStore,
        folder: Path,
        tokenizer_hash: str,
        *,
        method: str = "draft_model",
    ) -> None:
        self._kind: DraftKind = draft_kind(method)
        fold.check_publishable(ScopeConfig(**draft.scope_config))
        self._draft, self._store, self.folder, self._tokenizer_hash = draft, store, folder, tokenizer_hash
        self._lock = threading.Lock()

    def write(self, version: int) -> Update:
        """The update of one version; 0 is day 0, and undoes any other.

        Raises:
          CheckpointError: there is no such version, it is damaged or does not fit, or the file cannot be written.
        """
        with self._lock:
            tensors: dict[str, Tensor] = {}
            promise = Promise()
            if version:
                manifest, tensors = self._store.load(version)
                promise = _promise(manifest)
                check(manifest, tensors, self._draft.expected(), self._draft.base_id, self._tokenizer_hash)
            state = fold.fold(self._draft, tensors).state_dict()
            names = whole(fold.moving(self._draft, state), state)
            sent = {theirs: state[ours] for ours, theirs in self._kind.travelling(sorted(names)).items()}
            file = write_update(self.folder / f"v{version:06d}.safetensors", sent)
            self._prune(file.path)
            return Update(version, file.sha256[:12], file, promise)

    def _prune(self, newest: Path) -> None:
        files = sorted(self.folder.glob("v*.safetensors"), key=lambda path: path.stat().st_mtime_ns)
        for path in files[:-_KEEP]:
            if path != newest:
                path.unlink(missing_ok=True)


def _promise(manifest: Manifest) -> Promise:
    """Tensors that are published again were judged against another incumbent than the one they replace now."""
    gain = manifest.gate.get("gain")
    if manifest.restored is not None or not isinstance(gain, dict):
        return Promise()
    return Promise(gain.get("low"), manifest.parent or 0)
