"""Bodies of the OpenAI API, as many formats carry them: chat, completions and responses; whole or as stream chunks."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from adaptd.ingest.fields import are_messages, messages_of, sampling, seconds, text_of, token_ids
from adaptd.ingest.record import Message, Record


def question(body: Mapping[str, Any]) -> Record:
    """What a request body asks.

    Raises:
      NotText: a message is not text.
    """
    about = Record(model=str(body.get("model") or ""), **sampling(body))
    tools = body.get("tools")
    if body.get("tool_choice") == "none" or not isinstance(tools, list):
        tools = []
    kwargs = body.get("chat_template_kwargs")
    about = replace(about, tools=tuple(tools), template_kwargs=dict(kwargs) if isinstance(kwargs, Mapping) else {})
    if are_messages(body.get("messages")):
        return replace(about, messages=tuple(messages_of(body["messages"])))
    if "input" in body:
        return replace(about, messages=tuple(_response_input(body)))
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, str):
        return replace(about, prompt=prompt)
    return replace(about, prompt_ids=token_ids(prompt))


def _response_input(body: Mapping[str, Any]) -> Iterator[Message]:
    """Messages of a request to the responses API."""
    if body.get("instructions"):
        yield {"role": "system", "content": text_of(body["instructions"])}
    value = body["input"]
    if isinstance(value, str):
        yield {"role": "user", "content": value}
    elif isinstance(value, list):
        for item in value:
            if isinstance(item, Mapping) and item.get("type", "message") == "message":
                yield from messages_of([item])
            elif isinstance(item, Mapping) and item.get("type") == "function_call":
                yield {"role": "assistant", "content": "", "tool_calls": [_call(item)]}
            elif isinstance(item, Mapping) and item.get("type") == "function_call_output":
                yield {"role": "tool", "content": text_of(item.get("output")), "tool_call_id": item.get("call_id")}


def answers(body: Any) -> list[Record]:
    """The answers in a response: one a choice; a record with `error` for a failed one; empty if there is nothing.

    Args:
      body: the response as an object, as text, as a captured event stream (`data: ...` lines) or as its chunks.
    """
    if isinstance(body, str):
        if body.lstrip().startswith("data:"):
            return answers(list(_events(body)))
        return [Record(answer={"role": "assistant", "content": body})] if body else []
    if isinstance(body, list):
        return _joined([chunk for chunk in body if isinstance(chunk, Mapping)])
    if not isinstance(body, Mapping):
        return []
    if body.get("error"):
        return [Record(error="error response")]
    about = Record(
        id=str(body.get("id") or ""),
        model=str(body.get("model") or ""),
        at=seconds(body.get("created", body.get("created_at"))),
    )
    if isinstance(body.get("output"), list):
        return [replace(about, answer=_response_output(body["output"]))]
    choices = [choice for choice in body.get("choices") or () if isinstance(choice, Mapping)]
    if not choices and are_messages([body]):
        return [replace(about, answer=messages_of([body])[0])]
    several = len(choices) > 1
    return [
        replace(
            about,
            id=f"{about.id}-{index}" if several and about.id else about.id,
            answer=_answer(choice),
            finish_reason=str(choice.get("finish_reason") or ""),
            prompt_ids=token_ids(choice.get("prompt_token_ids") or body.get("prompt_token_ids")),
            answer_ids=token_ids(choice.get("token_ids")),
        )
        for index, choice in enumerate(choices)
    ]


def pairs(asked: Record, body: Any) -> list[Record]:
    """A question with each of its answers; the question alone if there is none.

    Raises:
      NotText: an answer is not text.
    """
    found = answers(body)
    return [_onto(asked, answer) for answer in found] or [asked]


def _onto(asked: Record, answer: Record) -> Record:
    return replace(
        asked,
        id=answer.id or asked.id,
        model=answer.model or asked.model,
        at=answer.at if answer.at == answer.at else asked.at,
        answer=answer.answer,
        finish_reason=answer.finish_reason,
        prompt_ids=answer.prompt_ids or asked.prompt_ids,
        answer_ids=answer.answer_ids,
        error=answer.error,
    )


def _answer(choice: Mapping[str, Any]) -> Message:
    message = choice.get("message")
    if isinstance(message, Mapping):
        message = {**message, "role": "assistant"}
        return messages_of([message])[0]
    return {"role": "assistant", "content": text_of(choice.get("text"))}


def _call(item: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "id": item.get("call_id"),
        "type": "function",
        "function": {"name": item.get("name"), "arguments": item.get("arguments")},
    }


def _response_output(output: Iterable[Any]) -> Message:
    """The assistant message that a response's output items make."""
    items = [item for item in output if isinstance(item, Mapping)]
    message: Message = {
        "role": "assistant",
        "content": "".join(text_of(i.get("content")) for i in items if i.get("type") == "message"),
    }
    calls = [_call(i) for i in items if i.get("type") == "function_call"]
    return message | {"tool_calls": calls} if calls else message


def _events(text: str) -> Iterator[Any]:
    """Objects of a captured server-sent event stream."""
    for line in text.splitlines():
        data = line.removeprefix("data:").strip()
        if line.startswith("data:") and data and data != "[DONE]":
            try:
                yield json.loads(data)
            except ValueError:
                return  # the capture ends in the middle of an event


def _joined(chunks: list[Mapping[str, Any]]) -> list[Record]:
    """The answer that stream chunks add up to; a stream without an end has none."""
    text, thought, reason = "", "", ""
    ids: list[int] = []
    calls: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for choice in chunk.get("choices") or ():
            if choice.get("index", 0) != 0:
                continue
            delta = choice.get("delta") or {}
            text += delta.get("content") or choice.get("text") or ""
            thought += delta.get("reasoning_content") or ""
            ids += token_ids(choice.get("token_ids"))
            reason = choice.get("finish_reason") or reason
            for part in delta.get("tool_calls") or ():
                _add(calls.setdefault(int(part.get("index") or 0), {"type": "function", "function": {}}), part)
    if not chunks or not reason:
        return [Record(error="stream without an end")] if chunks else []
    message: Message = {"role": "assistant", "content": text}
    if thought:
        message["reasoning_content"] = thought
    if calls:
        message["tool_calls"] = [calls[i] for i in sorted(calls)]
    first = chunks[0]
    return [
        Record(
            id=str(first.get("id") or ""),
            model=str(first.get("model") or ""),
            at=seconds(first.get("created")),
            answer=message,
            finish_reason=str(reason),
            answer_ids=tuple(ids),
        )
    ]


def _add(call: dict[str, Any], part: Mapping[str, Any]) -> None:
    """Add one streamed piece to a tool call: name and id come once, arguments in pieces."""
    if part.get("id"):
        call["id"] = part["id"]
    for name, value in (part.get("function") or {}).items():
        call["function"][name] = call["function"].get(name, "") + (value or "")
