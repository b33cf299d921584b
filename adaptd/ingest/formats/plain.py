"""A prompt and what was answered, by the usual names, or by the columns that `--map` names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from adaptd.ingest.fields import are_messages, decoded, dig, message_of, messages_of, sampling, seconds, text_of
from adaptd.ingest.record import NO_CONTENT, Item, Message, Record
from adaptd.ingest.turns import turns

NAME = "prompt and response"
_PROMPT = ("prompt", "question", "instruction")
_ANSWER = ("response", "completion", "answer", "output", "generated_text")
#: What `--map` may name.
MAPPED = ("prompt", "response", "messages", "system", "model", "time", "domain", "id")


def matches(row: Mapping[str, Any]) -> bool:
    """A prompt that is text."""
    return any(isinstance(row.get(name), str) for name in _PROMPT)


def read(row: Mapping[str, Any]) -> Iterator[Item]:
    """One record; a prompt is a user's turn."""
    prompt = next(row[name] for name in _PROMPT if isinstance(row.get(name), str))
    answer = next((row[name] for name in _ANSWER if row.get(name)), None)
    yield _record(row, prompt, answer, time=row.get("timestamp", row.get("created_at")))


def _record(
    row: Mapping[str, Any], prompt: str, answer: Any, *, time: Any, system: str = "", model: Any = None
) -> Item:
    if not prompt.strip():
        return NO_CONTENT
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    return Record(
        id=str(row.get("id") or ""),
        messages=(*messages, {"role": "user", "content": prompt}),
        answer=None if not answer else {"role": "assistant", "content": text_of(answer)},
        model=str(model or row.get("model") or ""),
        at=seconds(time),
        domain=str(row.get("domain") or ""),
        **sampling(row),
    )


@dataclass(frozen=True, slots=True)
class Mapped:
    """A reader of columns that the user names.

    Args:
      columns: our name (of `MAPPED`) -> column, or dotted path into it.
    """

    columns: Mapping[str, str]
    NAME = "mapped columns"

    def matches(self, row: Mapping[str, Any]) -> bool:
        """The column of the question is there."""
        asked = self.columns.get("messages") or self.columns.get("prompt", "prompt")
        return dig(row, asked) is not None

    def read(self, row: Mapping[str, Any]) -> Iterator[Item]:
        """One record; one a turn of the assistant where messages are mapped and no response is."""
        said = {name: dig(row, column) for name, column in self.columns.items()}
        about = {"id": said.get("id"), "domain": said.get("domain")}
        if "messages" in self.columns:
            messages = decoded(said["messages"])
            if not are_messages(messages):
                yield NO_CONTENT
                return
            base = Record(
                id=str(about["id"] or ""),
                domain=str(about["domain"] or ""),
                model=str(said.get("model") or ""),
                at=seconds(said.get("time")),
            )
            answer = said.get("response")
            answered = [message_of({"role": "assistant", "content": answer})] if answer else []
            before = messages_of(messages)
            # With an answer of its own, earlier turns are context.
            context = frozenset(range(len(before))) if answered else frozenset()
            yield from turns(base, [*before, *answered], context)
            return
        prompt = said.get("prompt", dig(row, "prompt"))
        yield _record(
            about,
            text_of(prompt),
            said.get("response"),
            time=said.get("time"),
            system=str(said.get("system") or ""),
            model=said.get("model"),
        )
