"""The target's answers, generated once and kept: every learner of every stream and seed is measured on the same text.

Kept in one file a domain and set of prompts, in a folder named by what else they depend on: target, sampling, capture. A
file is a row of encoded traces, each behind its length; an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from adaptd.actors.parts import Pair
from adaptd.decoding.build import eos_ids
from adaptd.decoding.capture import CaptureConfig
from adaptd.decoding.engine import SpeculativeDecoder
from adaptd.decoding.request import DecodeRequest, SamplingParams
from adaptd.errors import AdaptdError
from adaptd.models.chat import render_chat
from adaptd.models.load import weights_id
from buffers.codec import decode, encode
from buffers.trace import Trace

_LENGTH = struct.Struct("<Q")
_CHUNK = 64
#: Answers to one prompt before those that are given again, at most.
_AGAIN = 100_000


class AnswerPool:
    """Numbered answers of one target to the prompts of each domain.

    Args:
      pair: target, day-0 draft (speeds generation up, never changes an answer) and tokenizer.
      prompts: by domain; answer number i is to prompt i modulo their number, with seed i; each can be had `again`.
      home: folder of the cache.
      temperature, max_tokens: of every answer.
      k, k_top, k_tail: of the decoder that generates, and of its capture.
      max_length: longest prompt and answer; longer prompts are left out.
    """

    def __init__(
        self,
        pair: Pair,
        prompts: Mapping[str, Sequence[str]],
        home: Path,
        *,
        temperature: float,
        max_tokens: int,
        k: int,
        k_top: int,
        k_tail: int = 0,
        max_length: int,
        max_batch: int = 16,
    ) -> None:
        self._pair, self._max_batch, self._k = pair, max_batch, k
        self._temperature, self._max_tokens, self._max_length = temperature, max_tokens, max_length
        # What is scored behind a rejection is another thing for each draft: `adaptd.bench.branches`.
        self._capture = CaptureConfig(k_top=k_top, k_tail=k_tail, k_branch=0, reserved_share=0.0, target_id="bench")
        self._prompts = {domain: self._rendered(domain, texts) for domain, texts in prompts.items()}
        self._home = home / _digest([weights_id(pair.target), temperature, max_tokens, k_top, k_tail, max_length])

    def _rendered(self, domain: str, texts: Sequence[str]) -> list[tuple[int, ...]]:
        rendered = [tuple(render_chat(self._pair.tokenizer, [{"role": "user", "content": t}])) for t in texts]
        fitting = [ids for ids in rendered if len(ids) + self._max_tokens <= self._max_length]
        if not fitting:
            raise AdaptdError(f"no {domain} prompt fits {self._max_length} tokens with an answer of {self._max_tokens}")
        return fitting

    def get(self, domain: str, n: int, progress: Callable[[int], None] = lambda _: None) -> list[Trace]:
        """The first `n` answers of a domain: `read_answers` of what `fill` returns."""
        return read_answers(self.fill(domain, n, progress), n)

    def fill(self, domain: str, n: int, progress: Callable[[int], None] = lambda _: None, again: int = 0) -> Path:
        """The domain's file, with answers generated where it has fewer than `n`; `progress` is told of new ones.

        Args:
          again: above 0: the file of the `again`-th other answers to the same prompts (`file_again`).

        Raises:
          AdaptdError: there are no prompts of that domain.
        """
        if domain not in self._prompts:
            raise AdaptdError(f"no prompts of domain {domain!r}; there are: {', '.join(sorted(self._prompts))}")
        path = file_again(self._home / f"{domain}-{_digest(self._prompts[domain])}.traces", again)
        # Other seeds, the same prompts.
        shift = again * _AGAIN * len(self._prompts[domain])
        path.parent.mkdir(parents=True, exist_ok=True)
        payloads = _read(path)
        if len(payloads) < n:
            with path.open("ab") as file:
                file.truncate(sum(len(p) + _LENGTH.size for p in payloads))
                # Whole chunks, so that a cache grown in steps equals one made at once.
                for start in range(len(payloads), n, _CHUNK):
                    for trace in self._generate(domain, range(shift + start, shift + start + _CHUNK)):
                        payload = encode(trace)
                        file.write(_LENGTH.pack(len(payload)) + payload)
                    file.flush()
                    progress(_CHUNK)
        return path

    def _generate(self, domain: str, numbers: range) -> list[Trace]:
        pair, prompts = self._pair, self._prompts[domain]
        engine = SpeculativeDecoder(
            pair.target,
            pair.draft.model,
            k=self._k,
            max_batch=self._max_batch,
            max_length=self._max_length,
            eos_ids=eos_ids(pair.target, pair.tokenizer),
            capture=self._capture,
        )
        waiting = [
            DecodeRequest(
                request_id=f"{domain}-{i}",
                prompt_ids=prompts[i % len(prompts)],
                params=SamplingParams(temperature=self._temperature, max_tokens=self._max_tokens, seed=i),
                domain=domain,
            )
            for i in reversed(numbers)
        ]
        found: dict[str, Trace] = {}
        while waiting or engine.active:
            while waiting and engine.can_add():
                engine.add(waiting.pop())
            for delta in engine.step():
                if delta.finished is not None and delta.finished.trace is not None:
                    found[delta.finished.request_id] = delta.finished.trace
        return [found[f"{domain}-{i}"] for i in numbers]


def file_again(path: Path, again: int) -> Path:
    """The file beside an answer file that has the `again`-th other answers; 0: that file itself."""
    return path.with_name(f"{path.stem}-again{again}{path.suffix}") if again else path


def _digest(about: object) -> str:
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]


def read_answers(path: Path, n: int) -> list[Trace]:
    """The first `n` answers of a file that `AnswerPool.fill` returned."""
    return [decode(payload) for payload in _read(path)[:n]]


def _read(path: Path) -> list[bytes]:
    """Payloads of the whole chunks of a file; what an interrupted run left half-written is ignored."""
    payloads = list(_payloads(path.read_bytes())) if path.is_file() else []
    return payloads[: len(payloads) // _CHUNK * _CHUNK]


def _payloads(content: bytes) -> Iterator[bytes]:
    at = 0
    while at + _LENGTH.size <= len(content):
        (size,) = _LENGTH.unpack_from(content, at)
        if at + _LENGTH.size + size > len(content):
            return
        yield content[at + _LENGTH.size : at + _LENGTH.size + size]
        at += _LENGTH.size + size
