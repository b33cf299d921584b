"""Request and response in one line, as home-made proxies write them; also a request body with `response` beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from adaptd.ingest import openai_body
from adaptd.ingest.fields import are_messages, seconds
from adaptd.ingest.record import NO_CONTENT, Item

NAME = "OpenAI request and response"
_TIMES = ("timestamp", "time", "created_at", "created", "start_time", "ts")


def matches(row: Mapping[str, Any]) -> bool:
    """A request object, or messages or an input, with a response."""
    answered = "response" in row or "completion" in row
    return answered and (isinstance(row.get("request"), Mapping) or are_messages(row.get("messages")) or "input" in row)


def read(row: Mapping[str, Any]) -> Iterator[Item]:
    """One record a choice."""
    body = row["request"] if isinstance(row.get("request"), Mapping) else row
    asked = openai_body.question(body)
    if not asked.asks():
        yield NO_CONTENT
        return
    at = next((t for name in _TIMES if (t := seconds(row.get(name))) == t), asked.at)
    asked = replace(asked, id=str(row.get("id") or ""), at=at, cached=row.get("cache_hit") is True)
    status = row.get("status_code", row.get("status"))
    if row.get("error") or (isinstance(status, int) and status >= 400):
        yield replace(asked, error="error response")
        return
    for record in openai_body.pairs(asked, row.get("response", row.get("completion"))):
        yield replace(record, at=at if at == at else record.at)
