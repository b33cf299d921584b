"""The normalised record: one answer that somebody gave, with what was asked; whatever format it was logged in."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Message = dict[str, Any]

#: Fast, and half the size: a spool of ten million records is bounded by the disk.
_LEVEL = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One turn of an assistant. Empty, NaN or None: the log does not say.

    What was asked is `messages` (a chat, without the answer) or `prompt` (text as the model saw it) or `prompt_ids`.
    """

    id: str = ""
    messages: Sequence[Message] = ()
    """OpenAI messages, content as text."""
    prompt: str = ""
    answer: Message | None = None
    """An assistant message: content, perhaps tool_calls and reasoning_content. None: only the question is logged."""
    tools: Sequence[dict[str, Any]] = ()
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the chat template (`chat_template_kwargs` of vLLM and SGLang)."""
    model: str = ""
    at: float = math.nan
    """Unix seconds."""
    domain: str = ""
    tenant: str = ""
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    max_tokens: int | None = None
    finish_reason: str = ""
    prompt_ids: Sequence[int] = ()
    answer_ids: Sequence[int] = ()
    cached: bool = False
    """The answer came from a cache: nothing was decoded."""
    error: str = ""
    """The request failed; a word or two of why, never text of the request."""

    def asks(self) -> bool:
        """Whether there is a question."""
        return bool(self.messages or self.prompt or self.prompt_ids)

    def answers(self) -> bool:
        """Whether there is an answer with something in it."""
        answer = self.answer or {}
        return bool(answer.get("content") or answer.get("tool_calls") or self.answer_ids)

    def digest(self, *, with_answer: bool) -> bytes:
        """16 bytes, equal for the same question (and answer) whoever logged it."""
        about: list[Any] = [list(self.messages), self.prompt, list(self.tools), self.template_kwargs]
        if not (self.messages or self.prompt):
            about.append(list(self.prompt_ids))
        if with_answer:
            about += [self.answer, () if self.answer else list(self.answer_ids)]
        return hashlib.blake2b(json.dumps(about, sort_keys=True).encode(), digest_size=16).digest()

    def pack(self) -> bytes:
        """Bytes that `unpack` reads: JSON, compressed."""
        default = _DEFAULT
        said = {f.name: v for f in dataclasses.fields(self) if (v := getattr(self, f.name)) != getattr(default, f.name)}
        if math.isnan(self.at):
            said.pop("at", None)
        return zlib.compress(json.dumps(said, ensure_ascii=False).encode("utf-8", "surrogatepass"), _LEVEL)


_DEFAULT = Record()


def unpack(payload: bytes) -> Record:
    """What `Record.pack` wrote."""
    return Record(**json.loads(zlib.decompress(payload).decode("utf-8", "surrogatepass")))


@dataclass(frozen=True, slots=True)
class Half:
    """A question or an answer that is logged apart from the other; they are joined by `key`."""

    key: str
    side: Literal["question", "answer"]
    records: Sequence[Record]
    """One question, or the answers to it."""
    in_parts: bool = False
    """Whether a question may come in several pieces that add up."""


@dataclass(frozen=True, slots=True)
class Refused:
    """What a row cannot be used for, in a few words; never text of the log."""

    reason: str


Item = Record | Half | Refused

#: The refusal that ends a file which holds nothing else.
NO_CONTENT = Refused("no message content")


def join(question: Record, answer: Record) -> Record:
    """One record from two halves; what both say is taken from the question."""
    default = _DEFAULT
    said = {
        f.name: value
        for f in dataclasses.fields(answer)
        if getattr(question, f.name) in (getattr(default, f.name), ()) or (f.name == "at" and math.isnan(question.at))
        if (value := getattr(answer, f.name)) != getattr(default, f.name)
    }
    return dataclasses.replace(question, **said)
