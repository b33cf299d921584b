"""One learner on one stream with one seed: its record, and a file of finished ones from which a long benchmark goes on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from adaptd import __version__
from adaptd.bench import metrics
from adaptd.bench.learners import LearnerSpec
from adaptd.bench.stream import Stream
from adaptd.config import Config
from adaptd.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Run:
    """What came of it."""

    stream: str
    learner: str
    seed: int
    lr: float | None
    emitted: list[float]
    rounds: list[float]
    versions: list[int]
    trainable_fraction: float
    trainable_bytes: int
    bytes_per_position: float
    """Captured bytes over the positions of answers and those behind their rejections."""
    tokens_per_s: float | None
    learner_s: float
    steps: int
    bytes_per_token: float | None = None
    """Captured bytes over the answers' tokens; None in a run from before there were branches."""

    @property
    def curve(self) -> metrics.Curve:
        """For the metrics."""
        return metrics.Curve(np.array(self.emitted), np.array(self.rounds))


def run_key(config: Config, stream: Stream, spec: LearnerSpec, seed: int) -> str:
    """Names a run by what was asked for: two of the same key differ in nothing but the code that ran them."""
    about = [
        __version__,
        config.model_dump(mode="json", exclude={"state_dir"}),
        stream.model_dump(mode="json", exclude={"about"}),
        spec.model_dump(mode="json", exclude={"about"}),
        seed,
    ]
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:24]


class RunLog:
    """Finished runs in a JSON Lines file, one written as soon as it ends.

    Raises:
      ConfigError: the file exists and is something else. A last line that was cut off is dropped.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._runs: dict[str, Run] = {}
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        whole, _, cut_off = text.rpartition("\n")
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                found = json.loads(line)
                key = found.pop("key")
                self._runs[key] = Run(**found)
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise ConfigError(
                    f"{path}, line {number}: not a run of this benchmark ({error}); name another file"
                ) from error
        if cut_off and not cut_off.startswith('{"key": "'):
            raise ConfigError(f"{path} is not a file of runs of this benchmark; name another file")

    def get(self, key: str) -> Run | None:
        """The run of that key, if it is there."""
        return self._runs.get(key)

    def add(self, key: str, run: Run) -> None:
        """Keep one, on disk too."""
        self._runs[key] = run
        # Written whole: a line that an earlier run left cut off must not swallow this one.
        partial = self._path.with_name(self._path.name + ".part")
        lines = (json.dumps({"key": k, **dataclasses.asdict(r)}) + "\n" for k, r in self._runs.items())
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text("".join(lines), encoding="utf-8")
        partial.replace(self._path)
