"""What many formats write alike: text in parts, messages, times, sampling settings."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from adaptd.ingest.record import Message

#: Unix seconds above this are taken for milli-, micro- or nanoseconds (the year 5138).
_LATEST = 1e11
_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "observation": "tool",
    "function": "tool",
    "developer": "system",
}
#: What a request calls the longest answer.
_MOST = ("max_completion_tokens", "max_tokens", "max_new_tokens", "max_output_tokens")
_TEXT_PARTS = ("text", "input_text", "output_text")


class NotText(ValueError):
    """Content that is not text, such as an image: it cannot be replayed."""


def text_of(content: Any) -> str:
    """Text of a message's content: a string, or a list of parts.

    Raises:
      NotText: a part is something else.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(_part(part) for part in content)
    raise NotText


def _part(part: Any) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and part.get("type", "text") in _TEXT_PARTS and isinstance(part.get("text"), str):
        return str(part["text"])
    raise NotText


def message_of(value: Mapping[str, Any]) -> Message:
    """A message as the chat template wants it: role, text, and of the rest only what templates read.

    Raises:
      NotText: its content is not text.
    """
    role = str(value.get("role") or "user")
    message: Message = {"role": _ROLES.get(role, role), "content": text_of(value.get("content"))}
    for name in ("name", "tool_calls", "tool_call_id", "reasoning_content"):
        if value.get(name):
            message[name] = value[name]
    return message


def are_messages(value: Any) -> bool:
    """Whether this is a list of chat messages."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(m, Mapping) and "role" in m and ("content" in m or "tool_calls" in m) for m in value)
    )


def messages_of(values: Iterable[Mapping[str, Any]]) -> list[Message]:
    """`message_of` each."""
    return [message_of(value) for value in values]


def role_of(name: Any) -> str:
    """The chat role that a format's own word means."""
    return _ROLES.get(str(name).lower(), str(name).lower())


def seconds(value: Any) -> float:
    """Unix seconds of a number (s, ms, us or ns), an ISO time or a datetime; NaN for anything else. No zone: UTC."""
    if isinstance(value, bool) or value is None:
        return math.nan
    if isinstance(value, datetime):
        return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            try:
                return seconds(datetime.fromisoformat(value.strip()))
            except ValueError:
                return math.nan
    if isinstance(value, int | float) and math.isfinite(value) and value > 0:
        while value > _LATEST:
            value /= 1000.0
        return float(value)
    return math.nan


def dig(row: Mapping[str, Any], dotted: str) -> Any:
    """The value behind a name, or behind a dotted path of names; None where there is none."""
    if dotted in row:
        return row[dotted]
    head, dot, rest = dotted.partition(".")
    inner = row.get(head)
    if isinstance(inner, str) and dot and inner[:1] == "{":
        inner = decoded(inner)
    return dig(inner, rest) if dot and isinstance(inner, Mapping) else None


def decoded(value: Any) -> Any:
    """JSON inside a string, or the value itself."""
    if isinstance(value, str) and value[:1] in "{[" and value[:1]:
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def sampling(body: Any) -> dict[str, Any]:
    """Temperature, top_p, top_k and max_tokens of a request, as `Record` names them."""
    body = decoded(body)
    if not isinstance(body, Mapping):
        return {}
    most = next((body[name] for name in _MOST if body.get(name)), None)
    top_k = number(body.get("top_k"))
    found = {
        "temperature": number(body.get("temperature")),
        "top_p": number(body.get("top_p")),
        # vLLM and SGLang write -1 for none.
        "top_k": None if top_k is None else max(0, int(top_k)),
        "max_tokens": None if number(most) is None else int(number(most) or 0),
    }
    return {name: value for name, value in found.items() if value is not None}


def number(value: Any) -> float | None:
    """A finite number, also where it is written as text."""
    if isinstance(value, bool):
        return None
    try:
        found = float(value)
    except (TypeError, ValueError):
        return None
    return found if math.isfinite(found) else None


def token_ids(value: Any) -> tuple[int, ...]:
    """A list of token ids, or nothing."""
    if isinstance(value, list) and value and all(isinstance(i, int) and i >= 0 for i in value):
        return tuple(value)
    return ()
