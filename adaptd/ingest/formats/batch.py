"""Batch API: an input file of requests and an output file of responses, in any order, joined by `custom_id`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from adaptd.ingest import openai_body
from adaptd.ingest.record import NO_CONTENT, Half, Item, Record

NAME = "batch input and output"


def matches(row: Mapping[str, Any]) -> bool:
    """Every line has a `custom_id`, and a body or a response."""
    return "custom_id" in row and ("body" in row or "response" in row)


def read(row: Mapping[str, Any]) -> Iterator[Item]:
    """Half of a record."""
    key = f"batch {row['custom_id']}"
    if isinstance(row.get("body"), Mapping):
        asked = openai_body.question(row["body"])
        yield Half(key, "question", [replace(asked, id=str(row["custom_id"]))]) if asked.asks() else NO_CONTENT
        return
    response = row.get("response")
    body = response.get("body") if isinstance(response, Mapping) else None
    status = response.get("status_code", 200) if isinstance(response, Mapping) else 0
    if row.get("error") or status != 200:
        yield Half(key, "answer", [Record(error="error response")])
        return
    # The answer's own id is the server's; the record goes by the one that both files have.
    yield Half(key, "answer", [replace(a, id="") for a in openai_body.answers(body)] or [Record(error="no answer")])
