"""Answers in OpenAI's two dialects, chat and text: whole, and as server-sent events.

Every body carries adaptd's own extension beside OpenAI's fields: `"adaptd": {"rounds", "proposed", "accepted",
"mean_acceptance_length", "draft_version"}`, in a stream on the last chunk of each choice and, summed, on the usage chunk.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from adaptd.server.service import Chunk, SpeculativeStats, Usage


@dataclass(slots=True)
class Choice:
    """What has arrived of one choice."""

    prompt_tokens: int
    text: list[str] = field(default_factory=list)
    tokens: int = 0
    last: Chunk | None = None

    def add(self, chunk: Chunk) -> None:
        """Take in the next chunk."""
        self.text.append(chunk.text)
        self.tokens += chunk.tokens
        if chunk.finish_reason is not None:
            self.last = chunk

    @property
    def usage(self) -> Usage:
        """The service's count where it gave one, else the sum over the chunks."""
        counted = self.last.usage if self.last is not None else None
        return counted or Usage(self.prompt_tokens, self.tokens)


@dataclass(frozen=True, slots=True)
class Dialect:
    """The differences between the two routes."""

    id_prefix: str
    whole_object: str
    chunk_object: str
    chat: bool

    def whole(self, index: int, choice: Choice) -> dict[str, Any]:
        """A complete choice."""
        text = "".join(choice.text)
        finish = choice.last.finish_reason if choice.last is not None else None
        content = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        return {"index": index, **content, "logprobs": None, "finish_reason": finish}

    def piece(self, index: int, chunk: Chunk) -> dict[str, Any]:
        """A choice with the text of one chunk."""
        content: dict[str, Any] = {"delta": {"content": chunk.text}} if self.chat else {"text": chunk.text}
        return {"index": index, **content, "logprobs": None, "finish_reason": chunk.finish_reason}

    def opening(self, index: int) -> dict[str, Any] | None:
        """What comes before the first text of a choice: in a chat, whose turn it is."""
        if not self.chat:
            return None
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


CHAT = Dialect("chatcmpl-", "chat.completion", "chat.completion.chunk", chat=True)
TEXT = Dialect("cmpl-", "text_completion", "text_completion", chat=False)


class Answer:
    """One response under construction.

    Args:
        dialect: of the route.
        answer_id: `id` of the response.
        model: the name that the client used.
        choices: one per sequence, in order.
        choices_per_prompt: n; prompts count once in the usage however many answers they get.
    """

    def __init__(
        self, dialect: Dialect, answer_id: str, model: str, choices: Sequence[Choice], choices_per_prompt: int
    ) -> None:
        self._dialect, self._choices, self._per_prompt = dialect, choices, choices_per_prompt
        self._head = {"id": answer_id, "object": dialect.whole_object, "created": int(time.time()), "model": model}
        self._opened: set[int] = set()

    def add(self, index: int, chunk: Chunk) -> None:
        """Take in the next chunk of choice `index`."""
        self._choices[index].add(chunk)

    def whole(self) -> dict[str, Any]:
        """The complete response body."""
        choices = [self._dialect.whole(index, choice) for index, choice in enumerate(self._choices)]
        return {**self._head, "choices": choices, "usage": self._usage(), "adaptd": self._stats(self._choices)}

    def events(self, index: int, chunk: Chunk, *, with_usage: bool) -> Iterable[bytes]:
        """Take in a chunk and give the events for it; `with_usage` puts OpenAI's null in every event but the last."""
        self.add(index, chunk)
        extra: dict[str, Any] = {"usage": None} if with_usage else {}
        if index not in self._opened:
            self._opened.add(index)
            if (opening := self._dialect.opening(index)) is not None:
                yield self._event([opening], extra)
        if chunk.finish_reason is not None:
            extra["adaptd"] = self._stats([self._choices[index]])
        if chunk.text or chunk.finish_reason is not None:
            yield self._event([self._dialect.piece(index, chunk)], extra)

    def usage_event(self) -> bytes:
        """The event that ends a stream with `stream_options.include_usage`."""
        return self._event([], {"usage": self._usage(), "adaptd": self._stats(self._choices)})

    def _event(self, choices: list[dict[str, Any]], extra: dict[str, Any]) -> bytes:
        return event({**self._head, "object": self._dialect.chunk_object, "choices": choices, **extra})

    def _usage(self) -> dict[str, Any]:
        prompt = sum(choice.usage.prompt_tokens for choice in self._choices[:: self._per_prompt])
        completion = sum(choice.usage.completion_tokens for choice in self._choices)
        cached = sum(choice.usage.cached_tokens for choice in self._choices[:: self._per_prompt])
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    @staticmethod
    def _stats(choices: Sequence[Choice]) -> dict[str, Any] | None:
        stats = [c.last.speculative for c in choices if c.last is not None and c.last.speculative is not None]
        if not stats:
            return None
        total = SpeculativeStats(
            sum(s.rounds for s in stats),
            sum(s.proposed for s in stats),
            sum(s.accepted for s in stats),
            max(s.draft_version for s in stats),
        )
        emitted = sum(choice.usage.completion_tokens for choice in choices)
        return {
            "rounds": total.rounds,
            "proposed": total.proposed,
            "accepted": total.accepted,
            "mean_acceptance_length": emitted / total.rounds if total.rounds else None,
            "draft_version": total.draft_version,
        }


def event(body: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


DONE = b"data: [DONE]\n\n"
