"""Langfuse observations: the blob export in snake case, the API in camel case."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from adaptd.ingest import openai_body
from adaptd.ingest.fields import are_messages, decoded, message_of, messages_of, sampling, seconds
from adaptd.ingest.record import NO_CONTENT, Item, Record, Refused

NAME = "Langfuse observations"


def matches(row: Mapping[str, Any]) -> bool:
    """An observation of a trace, with input and output."""
    return "input" in row and "output" in row and ("traceId" in row or "trace_id" in row)


def read(row: Mapping[str, Any]) -> Iterator[Item]:
    """One record of a generation."""
    if str(row.get("type", "GENERATION")).upper() != "GENERATION":
        yield Refused("observation that is not a generation")
        return
    asked, said = decoded(row["input"]), decoded(row["output"])
    tools: Any = []
    if isinstance(asked, Mapping):
        tools = asked.get("tools") or []
        asked = asked.get("messages", asked.get("prompt"))
    about = Record(
        id=str(row.get("id") or ""),
        model=str(row.get("model") or row.get("provided_model_name") or row.get("providedModelName") or ""),
        at=seconds(row.get("startTime") or row.get("start_time")),
        tenant=str(row.get("userId") or row.get("user_id") or ""),
        tools=tuple(tools) if isinstance(tools, list) else (),
        error="failed call" if str(row.get("level", "")).upper() == "ERROR" else "",
        **sampling(row.get("modelParameters", row.get("model_parameters"))),
    )
    if are_messages(asked):
        about = replace(about, messages=tuple(messages_of(asked)))
    elif isinstance(asked, str) and asked:
        about = replace(about, messages=({"role": "user", "content": asked},))
    else:
        yield NO_CONTENT
        return
    if isinstance(said, Mapping) and ("content" in said or "tool_calls" in said):
        yield replace(about, answer=message_of({**said, "role": "assistant"}))
    elif isinstance(said, list) and are_messages(said):
        yield replace(about, answer=message_of({**said[-1], "role": "assistant"}))
    elif said and isinstance(said, str | Mapping):
        yield from (replace(r, id=about.id, at=about.at) for r in openai_body.pairs(about, said))
    else:
        yield about
