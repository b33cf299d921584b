"""Conversations: fine-tuning `messages`, `conversation` of lmsys-chat and WildChat, `conversations` of ShareGPT."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from adaptd.ingest.fields import are_messages, message_of, role_of, seconds, text_of
from adaptd.ingest.record import NO_CONTENT, Item, Message, Record
from adaptd.ingest.turns import turns

NAME = "conversations"
_COLUMNS = ("messages", "conversation", "conversations", "items")
_TEXT = ("value", "text", "markdown", "content")


def _column(row: Mapping[str, Any]) -> str | None:
    for name in _COLUMNS:
        value = row.get(name)
        if isinstance(value, list) and value and all(isinstance(m, Mapping) and _speaker(m) for m in value):
            return name
    return None


def _speaker(message: Mapping[str, Any]) -> Any:
    return message.get("from") or message.get("role") or message.get("user")


def matches(row: Mapping[str, Any]) -> bool:
    """A list of turns that say who speaks."""
    return _column(row) is not None


def read(row: Mapping[str, Any]) -> Iterator[Item]:
    """One record a turn of the assistant."""
    values = row[_column(row) or "messages"]
    conversation = [_message(m) for m in values]
    if not any(m["content"] or m.get("tool_calls") for m in conversation):
        yield NO_CONTENT
        return
    times = [t for m in values if (t := seconds(m.get("timestamp"))) == t]
    tools = row.get("tools")
    name = row.get("conversation_id") or row.get("conversation_hash") or row.get("id") or ""
    about = Record(
        id=str(name),
        model=str(row.get("model") or ""),
        at=next(
            (t for n in ("timestamp", "created_at", "tstamp") if (t := seconds(row.get(n))) == t),
            min(times, default=math.nan),
        ),
        tools=tuple(tools) if isinstance(tools, list) else (),
        domain=str(row.get("domain") or ""),
    )
    # Fine-tuning data marks turns that are not to be learned with weight 0.
    silent = frozenset(i for i, m in enumerate(values) if m.get("weight") == 0)
    yield from turns(about, conversation, silent)


def _message(value: Mapping[str, Any]) -> Message:
    if are_messages([value]):
        return message_of(value)
    content = next((value[name] for name in _TEXT if value.get(name) is not None), "")
    return {"role": role_of(_speaker(value)), "content": text_of(content)}
