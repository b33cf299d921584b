"""SGLang's JSON request log: `request.finished` carries question and answer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from adaptd.ingest.fields import are_messages, dig, messages_of, sampling, seconds, token_ids
from adaptd.ingest.record import NO_CONTENT, Item, Record, Refused

NAME = "SGLang request log"
_SILENT = ("request.received", "request.received.openai")


def matches(row: Mapping[str, Any]) -> bool:
    """An `event` of a request."""
    return str(row.get("event", "")).startswith("request.") and "rid" in row


def read(row: Mapping[str, Any]) -> Iterator[Item]:
    """One record of a finished request; what was only received says nothing that the end does not say again."""
    if row["event"] in _SILENT:
        return
    asked, said = row.get("obj"), row.get("out")
    if not isinstance(asked, Mapping) or not isinstance(said, Mapping):
        yield NO_CONTENT
        return
    texts = [text for text in (asked.get("text"), said.get("text")) if isinstance(text, str)]
    if any(_is_cut(text) for text in texts) or not all(map(_whole, (asked.get("input_ids"), said.get("output_ids")))):
        yield Refused("text shortened by the log level; run SGLang with --log-requests-level 3")
        return
    reason = dig(said, "meta_info.finish_reason")
    kind = str(reason.get("type") if isinstance(reason, Mapping) else reason or "")
    messages: Any = asked.get("messages")
    text: Any = asked.get("text")
    record = Record(
        id=str(row["rid"]),
        messages=tuple(messages_of(messages)) if are_messages(messages) else (),
        prompt=text if isinstance(text, str) else "",
        prompt_ids=token_ids(asked.get("input_ids")),
        answer={"role": "assistant", "content": said["text"]} if isinstance(said.get("text"), str) else None,
        answer_ids=token_ids(said.get("output_ids")),
        model=str(asked.get("model") or ""),
        at=seconds(row.get("timestamp")),
        finish_reason=kind,
        error="aborted" if kind == "abort" else "",
        **sampling(asked.get("sampling_params")),
    )
    yield record if record.asks() else NO_CONTENT


def _is_cut(text: str) -> bool:
    """Level 2 keeps the ends of a long string with ' ... ' between them."""
    middle = len(text) // 2
    return " ... " in text[max(0, middle - 8) : middle + 8] and len(text) >= 512


def _whole(ids: Any) -> bool:
    """Shortened lists become strings."""
    return not isinstance(ids, str)
