"""vLLM's text log: lines of one request, joined by its id; what the client sent is preferred to the rendered prompt."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from adaptd.ingest import openai_body
from adaptd.ingest.fields import number, token_ids
from adaptd.ingest.record import Half, Item, Record

NAME = "vLLM log"
_STRING = r"(?P<text>'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|None)"
_RECEIVED = re.compile(r"Received request (?P<id>[^\s:]+): (?:prompt: .*?, )?params: SamplingParams\((?P<params>.*)\)")
_DETAILS = re.compile(rf"Request (?P<id>\S+) details: prompt: {_STRING}(?:, prompt_token_ids: (?P<ids>\[[\d, ]*\]))?")
_BODY = re.compile(r"Request (?P<id>\S+) JSON body: (?P<body>\{.*\})\s*$")
_GENERATED = re.compile(
    rf"Generated response (?P<id>[^\s:]+)(?P<kind> \([^)]*\))?: output: {_STRING}"
    r"(?:, output_token_ids: (?P<ids>\[[\d, ]*\]))?.*?(?:, finish_reason: (?P<reason>\w+))?\s*$"
)
_LINE = re.compile(r"Received request |Generated response |Request \S+ (?:details|JSON body): ")
_SETTING = re.compile(r"(temperature|top_p|top_k|max_tokens)=(-?[\d.e+-]+)")


def is_line(text: str) -> bool:
    """Whether a line is about the content of a request."""
    return _LINE.search(text) is not None


def matches(row: Mapping[str, Any]) -> bool:
    """A line of text."""
    return set(row) == {"line"}


def read(row: Mapping[str, Any]) -> Iterator[Item]:
    """Halves of records: what was asked may come in several lines, and what comes last adds to what came before."""
    line = row["line"]
    if found := _BODY.search(line):
        try:
            yield Half(
                _key(found),
                "question",
                [replace(openai_body.question(json.loads(found["body"])), id=found["id"])],
                in_parts=True,
            )
        except ValueError:
            return
    elif found := _DETAILS.search(line):
        text = ast.literal_eval(found["text"]) or ""
        ids = token_ids(json.loads(found["ids"])) if found["ids"] else ()
        yield Half(_key(found), "question", [Record(id=found["id"], prompt=text, prompt_ids=ids)], in_parts=True)
    elif found := _RECEIVED.search(line):
        values = {name: number(value) for name, value in _SETTING.findall(found["params"])}
        top_k = values.get("top_k")
        asked = Record(
            id=found["id"],
            temperature=values.get("temperature"),
            top_p=values.get("top_p"),
            top_k=None if top_k is None else max(0, int(top_k)),
            max_tokens=None if values.get("max_tokens") is None else int(values["max_tokens"] or 0),
        )
        yield Half(_key(found), "question", [asked], in_parts=True)
    elif (found := _GENERATED.search(line)) and "delta" not in (found["kind"] or ""):
        content = ast.literal_eval(found["text"]) or ""
        ids = token_ids(json.loads(found["ids"])) if found["ids"] else ()
        reason = found["reason"] or ""
        answer = Record(
            answer={"role": "assistant", "content": content},
            answer_ids=ids,
            finish_reason="" if reason == "None" else reason,
            error="aborted" if reason == "abort" else "",
        )
        yield Half(_key(found), "answer", [answer])


def _key(found: re.Match[str]) -> str:
    return f"vllm {found['id']}"
