"""LiteLLM's StandardLoggingPayload."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from adaptd.ingest import openai_body
from adaptd.ingest.fields import are_messages, dig, sampling, seconds
from adaptd.ingest.record import NO_CONTENT, Item

NAME = "LiteLLM StandardLoggingPayload"


def matches(row: Mapping[str, Any]) -> bool:
    """`call_type` beside `startTime` in camel case is LiteLLM's alone."""
    return "call_type" in row and "startTime" in row and "messages" in row


def read(row: Mapping[str, Any]) -> Iterator[Item]:
    """One record a choice; nothing where message logging was off."""
    messages, response = row.get("messages"), row.get("response")
    if isinstance(messages, Mapping):  # e.g. {"messages": [...]} of some call types
        messages = messages.get("messages")
    settings = row.get("model_parameters")
    body = {**settings, "model": row.get("model")} if isinstance(settings, Mapping) else {"model": row.get("model")}
    if are_messages(messages):
        body["messages"] = messages
    elif isinstance(messages, str) and messages and "redacted" not in messages.lower():
        body["prompt"] = messages
    else:
        yield NO_CONTENT
        return
    asked = replace(
        openai_body.question(body),
        id=str(row.get("id") or row.get("litellm_call_id") or ""),
        at=seconds(row.get("startTime")),
        tenant=str(dig(row, "metadata.user_api_key_team_id") or row.get("end_user") or ""),
        cached=row.get("cache_hit") is True or str(row.get("cache_hit")).lower() == "true",
        **sampling(settings),
    )
    if row.get("status") == "failure" or row.get("error_str"):
        yield replace(asked, error="failed call")
        return
    if response is None or (isinstance(response, str) and "redacted" in response.lower()[:40]):
        yield NO_CONTENT
        return
    for record in openai_body.pairs(asked, response):
        # The deployment that answered, where the response names an alias.
        yield replace(record, at=asked.at, model=record.model or asked.model)
