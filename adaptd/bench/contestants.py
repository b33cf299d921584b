"""Decoders that `adaptd bench decode` times side by side: adaptd's, transformers' and vLLM's, on one pair of models.

All decode greedily and to a fixed length, so that they have the same tokens to find. A time counts from the prompts to the
last token.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from adaptd.bench import vllm_worker
from adaptd.decoding.engine import SpeculativeDecoder
from adaptd.decoding.request import DecodeRequest, SamplingParams
from adaptd.decoding.runner import ModelRunner
from adaptd.decoding.timing import StepTimes, measure
from adaptd.errors import UpstreamUnavailable

Prompts = Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True)
class Sample:
    """One timed batch."""

    seconds: float
    answers: list[list[int]]
    rounds: float
    """Target passes that each row took part in, summed over rows."""

    @property
    def tokens(self) -> int:
        """In all answers."""
        return sum(map(len, self.answers))


class Contestant(Protocol):
    """A decoder under test."""

    def run(self, prompts: Prompts, tokens: int) -> Sample:
        """Continue all prompts at once, each by `tokens` tokens."""

    def close(self) -> None:
        """Free what it holds."""


class _InProcess:
    def close(self) -> None:
        """Nothing is held."""


class Native(_InProcess):
    """adaptd's engine.

    Args:
      domains: of each prompt that has one, which a chosen draft length goes by.
    """

    def __init__(self, engine: SpeculativeDecoder, domains: Mapping[tuple[int, ...], str] | None = None) -> None:
        self._engine, self._domains = engine, domains or {}

    def _add(self, prompts: Prompts, tokens: int) -> None:
        params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        for at, prompt in enumerate(prompts):
            domain = self._domains.get(tuple(prompt), "")
            self._engine.add(DecodeRequest(str(at), prompt, params, domain=domain))

    def run(self, prompts: Prompts, tokens: int) -> Sample:
        """See `Contestant`."""
        started, done = time.perf_counter(), {}
        self._add(prompts, tokens)
        while self._engine.active:
            for delta in self._engine.step():
                if delta.finished is not None:
                    done[int(delta.request_id)] = delta.finished
        seconds = time.perf_counter() - started
        ended = [done[at] for at in range(len(prompts))]
        return Sample(seconds, [list(f.token_ids) for f in ended], sum(f.stats.rounds for f in ended))

    def costs(self, prompts: Prompts, tokens: int) -> StepTimes | None:
        """Timed passes with all prompts active; None if the shortest answer ended before the last prompt was read."""
        self._add(prompts, tokens)
        engine = self._engine
        while engine.active and len(engine._rows) < len(prompts):
            engine.step()
        times = measure(engine) if engine._rows else None
        for at in range(len(prompts)):
            engine.abort(str(at))
        return times


class NativePlain(_InProcess):
    """The same target passes over the same cache without a draft: what speculation is to be compared with."""

    def __init__(self, target: PreTrainedModel, *, batch: int, max_length: int) -> None:
        self._runner = ModelRunner(target, slots=batch, capacity=max_length, max_length=max_length)
        self._length = max_length

    @torch.inference_mode()
    def run(self, prompts: Prompts, tokens: int) -> Sample:
        """See `Contestant`."""
        started = time.perf_counter()
        sizes = torch.tensor([len(p) for p in prompts])
        width = int(sizes.max())
        padded = torch.tensor([[*p, *[0] * (width - len(p))] for p in prompts])
        if width > 1:
            self._pass(padded[:, :-1], torch.arange(width - 1).expand(len(prompts), -1))
        n, last, found = sizes, padded.gather(1, sizes[:, None] - 1), []
        for _ in range(tokens):
            last = self._pass(last, n[:, None] - 1).argmax(-1)
            found.append(last)
            n = n + 1
        answers = torch.cat(found, 1).tolist()
        return Sample(time.perf_counter() - started, answers, tokens * len(prompts))

    def _pass(self, fed: Tensor, positions: Tensor) -> Tensor:
        length = min(self._length, -(-(int(positions.max()) + 1) // 32) * 32)
        masks = self._runner.masks(positions, length)
        return self._runner.forward(fed, positions, masks, 0, length, last_only=True)


class Transformers(_InProcess):
    """`generate` of transformers, with `draft` assisted generation: k proposals a round, no early end of a draft.

    Assisted generation takes one prompt at a time only.
    """

    def __init__(self, target: PreTrainedModel, draft: PreTrainedModel | None, k: int) -> None:
        self._target, self._draft, self._calls = target, draft, 0
        self._options: dict[str, Any] = {}
        if draft is not None:
            settings: Any = draft.generation_config
            settings.num_assistant_tokens, settings.num_assistant_tokens_schedule = k, "constant"
            settings.assistant_confidence_threshold = 0.0
            self._options["assistant_model"] = draft

    def run(self, prompts: Prompts, tokens: int) -> Sample:
        """See `Contestant`."""
        width = max(map(len, prompts))
        ids = torch.tensor([[*[0] * (width - len(p)), *p] for p in prompts])
        mask = torch.tensor([[*[0] * (width - len(p)), *[1] * len(p)] for p in prompts])
        self._calls = 0
        counting = self._target.register_forward_pre_hook(self._count)
        generate: Any = self._target.generate
        try:
            started = time.perf_counter()
            out = generate(
                ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, eos_token_id=None, **self._options
            )
            seconds = time.perf_counter() - started
        finally:
            counting.remove()
        return Sample(seconds, out[:, width:].tolist(), self._calls * len(prompts))

    def _count(self, *_: Any) -> None:
        self._calls += 1


class Vllm:
    """vLLM's offline engine in a process of its own, which waits on a pipe while others are timed.

    Args:
      python: of an environment that has vLLM.
      target, draft: model folders.
      log: file of its output.
    Raises: UpstreamUnavailable: it did not start; the message names the log.
    """

    def __init__(
        self, python: Path, target: str, draft: str, *, k: int, batch: int, dtype: str, max_length: int, log: Path
    ) -> None:
        about = {"target": target, "draft": draft, "k": k, "dtype": dtype, "batch": batch, "max_length": max_length}
        cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[: torch.get_num_threads()]))
        foreign = ("ADAPTD_", "VLLM_", "OMP_", "PYTHON")
        environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith(foreign)},
            "PATH": f"{python.parent}{os.pathsep}{os.environ.get('PATH', '')}",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": cores,
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                [str(python), str(vllm_worker.__file__), json.dumps(about)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
            )
        self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise UpstreamUnavailable(f"vLLM ended; its output is in {self._log}")
        found: dict[str, Any] = json.loads(line)
        return found

    def run(self, prompts: Prompts, tokens: int) -> Sample:
        """See `Contestant`."""
        assert self._process.stdin is not None
        print(
            json.dumps({"prompts": [list(p) for p in prompts], "tokens": tokens}), file=self._process.stdin, flush=True
        )
        found = self._answer()
        return Sample(found["seconds"], found["tokens"], found["rounds"])

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
