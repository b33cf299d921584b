r"""The checkpoint store: numbered versions in a folder, and CURRENT, the name of the one that serves.

    root/CURRENT                  "v000123\n"
    root/v000123/draft.safetensors
    root/v000123/manifest.json
    root/.lock                    held by a writer
    root/.tmp-*                   unfinished work of a writer that died

Invariants, at every moment and after `kill -9` or a power cut at any moment:

1. CURRENT is absent (day 0: the base draft serves) or names a complete, durable version. Replacing it is the one commit
   point of a publication.
2. CURRENT is the highest version there is. A folder above it was never named by anyone, so the next writer removes it
   and uses its number.
3. A published version never changes. Going back means publishing the old tensors as a new version.

Readers take no lock. Writers of any process exclude each other by the lock file, which a dead process cannot keep.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoints import atomic
from checkpoints.errors import CheckpointNotFound, CorruptCheckpoint, StoreUnavailable, Superseded
from checkpoints.manifest import Manifest, Status, plain

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = "draft.safetensors"
MANIFEST = "manifest.json"
CURRENT = "CURRENT"

_TEMPORARY = ".tmp-"
_NAME = re.compile(r"v(\d{6,})")


class CheckpointStore:
    """Publishes, lists, loads and prunes versions under one folder. Creating the object touches nothing.

    Every method translates an error of the operating system into `StoreUnavailable`.
    """

    def __init__(
        self, root: str | os.PathLike[str], *, lock_timeout_s: float = 10.0, clock: Callable[[], float] = time.time
    ) -> None:
        """`root` is created by the first write; `clock` gives Unix seconds for `created_at`."""
        self.root = Path(root)
        self._lock_timeout_s = lock_timeout_s
        self._clock = clock

    # Reading: no lock, no torch except in `load`.

    def current(self) -> int | None:
        """The version that serves, None on day 0. One small read: cheap enough to poll.

        Raises:
            CorruptCheckpoint: (`current`) CURRENT holds something else than a version's name, or is gone while versions
            exist.
        """
        with self._translated():
            try:
                text = (self.root / CURRENT).read_text(encoding="ascii", errors="replace").strip()
            except FileNotFoundError:
                # A first publication that died before its commit leaves v000001 and no CURRENT; more than that was lost
                # by other hands.
                if (highest := max(self._folders(), default=0)) > 1:
                    raise CorruptCheckpoint(
                        "current",
                        f"{self.root / CURRENT} is missing but {_name(highest)} exists; write a version's name into it",
                    ) from None
                return None
        if not (match := _NAME.fullmatch(text)):
            raise CorruptCheckpoint(
                "current",
                f"{self.root / CURRENT} holds {text[:40]!r}, not a version's name such as v000001; write one into it",
            )
        return int(match[1])

    def manifest(self, version: int) -> Manifest:
        """The manifest of one version.

        Raises:
            CheckpointNotFound: there is no such published version.
            CorruptCheckpoint: (`manifest`) it cannot be read, or is that of another version.
        """
        path = self._folder(version) / MANIFEST
        if version > (self.current() or 0):
            raise CheckpointNotFound(
                f"version {version} is not in {self.root}; `adaptd checkpoints list` shows those that are"
            )
        with self._translated():
            try:
                text = path.read_text(encoding="utf-8")
            except FileNotFoundError as exc:
                if path.parent.is_dir():
                    raise CorruptCheckpoint(
                        "manifest", f"{path} is missing; remove the folder or promote another version"
                    ) from exc
                raise CheckpointNotFound(
                    f"version {version} is not in {self.root}; it was pruned or never published"
                ) from exc
            except UnicodeDecodeError as exc:
                raise CorruptCheckpoint(
                    "manifest", f"{path} is not text ({exc.reason}); promote another version"
                ) from exc
        manifest = Manifest.from_json(text)
        if manifest.version != version:
            raise CorruptCheckpoint(
                "manifest", f"{path} is the manifest of version {manifest.version}; promote another version"
            )
        return manifest

    def load(self, version: int) -> tuple[Manifest, dict[str, Tensor]]:
        """Manifest and tensors (on the CPU), the file's sha256 verified before it is parsed.

        Raises:
            CheckpointNotFound: there is no such published version.
            CorruptCheckpoint: `manifest`, `sha256`.
        """
        from checkpoints import tensors  # torch takes seconds to import, and listing does not need it

        manifest = self.manifest(version)
        path = self._folder(version) / WEIGHTS
        with self._translated():
            try:
                return manifest, tensors.read(path, manifest.sha256)
            except FileNotFoundError as exc:
                raise CorruptCheckpoint("sha256", f"{path} is missing; promote another version") from exc

    def numbers(self) -> list[int]:
        """The published versions in ascending order, whether their manifests can be read or not."""
        current = self.current() or 0
        with self._translated():
            return sorted(number for number in self._folders() if number <= current)

    def versions(self) -> list[Manifest]:
        """The manifests of all published versions, oldest first.

        Raises:
            CorruptCheckpoint: (`manifest`) one cannot be read; the message names it.
        """
        return [self.manifest(number) for number in self.numbers()]

    # Writing: under the lock.

    def publish(
        self,
        tensors: Mapping[str, Tensor],
        *,
        base_id: str,
        tokenizer_hash: str,
        scope: str,
        scope_config: Mapping[str, Any],
        gate: Mapping[str, Any],
        window: Mapping[str, Any],
        config: Mapping[str, Any],
        note: str = "",
        over: int | None = None,
    ) -> Manifest:
        """Make `tensors` (any device; copied first) the next version, child of CURRENT, and let CURRENT name it.

        The mappings are kept as plain JSON: see `checkpoints.manifest.plain`. `over`: the version that CURRENT must still
        name, 0 for none: what was learned from one version must not become the child of another.

        Raises:
            Superseded: CURRENT names another version than `over`; nothing was written.
            CorruptCheckpoint: (`not_finite`) a tensor holds NaN or infinity; nothing was written.
            ValueError: there are no tensors, or a mapping holds something that has no JSON form; nothing was written.
            StoreUnavailable: the folder cannot be written or the lock was not free in time; CURRENT is unchanged.
        """
        if not tensors:
            raise ValueError("tensors (0) must not be empty; use rollback() to go back to the base draft")
        described = Manifest(
            version=0,
            parent=None,
            base_id=base_id,
            tokenizer_hash=tokenizer_hash,
            scope=scope,
            scope_config=plain(scope_config, "scope_config"),
            tensors=(),
            sha256="",
            gate=plain(gate, "gate"),
            window=plain(window, "window"),
            config=plain(config, "config"),
            created_at=0.0,
            status="promoted",
            note=note,
        )
        with self._writing():
            current = self.current()
            if over is not None and over != (current or 0):
                raise Superseded(
                    f"version {current or 0} serves, not {over}, on which these tensors rest: learn from it"
                )
            return self._commit(replace(described, parent=current), tensors)

    def promote(self, version: int) -> Manifest:
        """Publish an earlier version's tensors, verified, as a child of CURRENT; CURRENT itself stays as it is.

        Raises:
            CheckpointNotFound, CorruptCheckpoint: as `load`; CURRENT is unchanged.
        """
        with self._writing():
            current = self.current()
            manifest, tensors = self.load(version)
            if version == current:
                return manifest
            return self._republish(manifest, tensors, parent=current, status="promoted")

    def rollback(self, to: int | None = None, note: str = "") -> Manifest:
        """Publish the tensors of CURRENT's parent, or those of version `to` (0: day 0), verified, as a new version.

        The parent of the new version is that of the restored one, so repeated rollbacks walk back to day 0: the base
        draft, published as a version without tensors (`Manifest.is_reset`). `note` says why, for the manifest.

        Raises:
            CheckpointNotFound: nothing was published yet, CURRENT already is the base draft, or there is no version `to`.
            CorruptCheckpoint: the version to restore is damaged; CURRENT is unchanged.
        """
        with self._writing():
            current = self.current()
            if current is None:
                raise CheckpointNotFound(f"{self.root} holds no version yet, so there is nothing to roll back")
            serving = self.manifest(current)
            wanted = serving.parent if to is None else to
            if wanted == current:
                return serving
            if wanted:
                manifest, tensors = self.load(wanted)
                return self._republish(manifest, tensors, parent=manifest.parent, status="rolled_back", note=note)
            if serving.is_reset:
                raise CheckpointNotFound(
                    f"version {current} already is the base draft, so there is nothing to roll back to"
                )
            about = _noted("the base draft, as on day 0", note)
            empty = replace(serving, parent=None, gate={}, window={}, status="rolled_back", note=about, restored=0)
            return self._commit(empty, {})

    def prune(self, keep: int, also: Collection[int] = ()) -> list[int]:
        """Remove all but the newest `keep` versions and those of `also`; gives the removed. CURRENT's parent stays too.

        Raises:
            ValueError: `keep` is below 1.
        """
        if keep < 1:
            raise ValueError(f"keep ({keep}) must be at least 1, the version that serves")
        with self._writing():
            current = self.current()
            if current is None:
                return []
            numbers = self.numbers()
            needed = {current, self.manifest(current).parent, *numbers[-keep:], *also}
            removed = [number for number in numbers if number not in needed]
            for number in removed:
                # Renamed first: a removal that is interrupted leaves a temporary folder, never half a version.
                doomed = self.root / f"{_TEMPORARY}pruned-{_name(number)}"
                os.rename(self._folder(number), doomed)
                shutil.rmtree(doomed)
            return removed

    def recover(self) -> list[str]:
        """Remove what a killed writer left and give the names. Every write does this first as well."""
        if not self.root.is_dir():
            return []
        with self._writing(clear=False):
            return self._clear_leftovers()

    def _republish(
        self,
        manifest: Manifest,
        tensors: Mapping[str, Tensor],
        *,
        parent: int | None,
        status: Status,
        note: str = "",
    ) -> Manifest:
        origin = manifest.version if manifest.restored is None else manifest.restored
        about = _noted(f"the tensors of version {origin}" if origin else "the base draft, as on day 0", note)
        return self._commit(replace(manifest, parent=parent, status=status, note=about, restored=origin), tensors)

    def _commit(self, described: Manifest, tensors: Mapping[str, Tensor]) -> Manifest:
        """Write everything to a temporary folder, make it durable, rename it, and last replace CURRENT."""
        from checkpoints import tensors as files

        own = files.snapshot(tensors)
        if (name := files.not_finite(own)) is not None:
            raise CorruptCheckpoint(
                "not_finite", f"{name} holds NaN or infinity; the learner has to restart from the last version"
            )
        version = (self.current() or 0) + 1
        folder = Path(tempfile.mkdtemp(prefix=f"{_TEMPORARY}{_name(version)}-", dir=self.root))
        try:
            sha256 = files.write(folder / WEIGHTS, own)
            manifest = replace(
                described, version=version, tensors=files.specs(own), sha256=sha256, created_at=float(self._clock())
            )
            text = manifest.to_json()
            (folder / MANIFEST).write_text(text, encoding="utf-8")
            folder.chmod(0o755)  # mkdtemp makes it private; another user's `adaptd checkpoints list` may read
            for path in (folder / WEIGHTS, folder / MANIFEST, folder):
                atomic.sync(path)
            os.rename(folder, self._folder(version))
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        atomic.sync(self.root)
        atomic.replace_text(self.root / CURRENT, _name(version) + "\n")
        return Manifest.from_json(text)

    def _clear_leftovers(self) -> list[str]:
        current = self.current() or 0
        leftovers = [path for path in self.root.iterdir() if path.name.startswith(_TEMPORARY)]
        leftovers += [self._folder(number) for number in self._folders() if number > current]
        for path in leftovers:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        return sorted(path.name for path in leftovers)

    def _folder(self, version: int) -> Path:
        return self.root / _name(version)

    def _folders(self) -> list[int]:
        try:
            names = os.listdir(self.root)
        except FileNotFoundError:
            return []
        return [int(match[1]) for name in names if (match := _NAME.fullmatch(name))]

    @contextmanager
    def _writing(self, *, clear: bool = True) -> Iterator[None]:
        with self._translated():
            self.root.mkdir(parents=True, exist_ok=True)
            with atomic.exclusive(self.root / ".lock", self._lock_timeout_s):
                if clear:
                    self._clear_leftovers()
                yield

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except OSError as exc:
            raise StoreUnavailable(
                f"{exc.filename or self.root}: {exc.strerror or exc}; check that it is writable and the disk has room"
            ) from exc


def _noted(what: str, why: str) -> str:
    return f"{what}; {why}" if why else what


def _name(version: int) -> str:
    return f"v{version:06d}"
