"""Spans of a trace: OpenInference (Phoenix) and OpenTelemetry's GenAI conventions, as data frames or as OTLP JSON."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from adaptd.ingest.fields import NotText, decoded, dig, message_of, sampling, seconds, text_of
from adaptd.ingest.record import NO_CONTENT, Item, Message, Record, Refused

NAME = "OpenInference or OpenTelemetry GenAI spans"
_FLAT = re.compile(r"^(\d+)\.(.+)$")
_PREFIX = "attributes."
_GENAI_CALLS = ("chat", "text_completion", "generate_content", "")


def matches(row: Mapping[str, Any]) -> bool:
    """OTLP JSON, or a row of a span data frame."""
    if "resourceSpans" in row:
        return True
    span = any(str(name).startswith((f"{_PREFIX}llm.", f"{_PREFIX}gen_ai.")) for name in row)
    return span or (isinstance(row.get("attributes"), Mapping) and bool(row["attributes"]))


def read(row: Mapping[str, Any]) -> Iterator[Item]:
    """One record of each span that is a call of a model."""
    if "resourceSpans" not in row:
        yield _span(_of_frame(row), seconds(row.get("start_time") or row.get("startTime")), _name(row), row)
        return
    for resource in row["resourceSpans"] or ():
        for scope in resource.get("scopeSpans") or ():
            for span in scope.get("spans") or ():
                attributes = _of_otlp(span.get("attributes"))
                attributes |= _of_events(span.get("events") or ())
                yield _span(attributes, seconds(span.get("startTimeUnixNano")), str(span.get("spanId") or ""), span)


def _name(row: Mapping[str, Any]) -> str:
    return str(row.get("context.span_id") or dig(row, "context.span_id") or row.get("span_id") or "")


def _of_frame(row: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes by dotted name, whether columns are flat or nested."""
    found = {str(k).removeprefix(_PREFIX): v for k, v in row.items() if str(k).startswith(_PREFIX)}
    nested = row.get("attributes")
    if isinstance(nested, Mapping):
        found |= nested
    for name in ("span_kind", "status_code"):
        found.setdefault(name, row.get(name))
    return found


def _of_otlp(attributes: Any) -> dict[str, Any]:
    """OTLP's list of key and typed value."""
    return {str(a["key"]): _value(a.get("value") or {}) for a in attributes or () if "key" in a}


def _value(value: Mapping[str, Any]) -> Any:
    if "arrayValue" in value:
        return [_value(v) for v in value["arrayValue"].get("values") or ()]
    if "kvlistValue" in value:
        return {v["key"]: _value(v.get("value") or {}) for v in value["kvlistValue"].get("values") or ()}
    if "intValue" in value:  # OTLP writes 64-bit integers as text
        return int(value["intValue"])
    return next(iter(value.values()), None)


def _of_events(events: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Messages that older instrumentations log as events of the span."""
    asked: list[dict[str, Any]] = []
    said: list[dict[str, Any]] = []
    for event in events:
        name, about = str(event.get("name", "")), _of_otlp(event.get("attributes"))
        if name == "gen_ai.choice":
            said.append(_body(decoded(about.get("message", about)), "assistant"))
        elif name.startswith("gen_ai.") and name.endswith(".message"):
            asked.append(_body(about, name.split(".")[1]))
    found: dict[str, Any] = {}
    if asked:
        found["gen_ai.input.messages"] = asked
    if said:
        found["gen_ai.output.messages"] = said
    return found


def _body(about: Any, role: str) -> dict[str, Any]:
    about = about if isinstance(about, Mapping) else {"content": about}
    return {"role": about.get("role") or role, "content": decoded(about.get("content"))}


def _span(attributes: Mapping[str, Any], at: float, name: str, span: Mapping[str, Any]) -> Item:
    genai = any(key.startswith("gen_ai.") for key in attributes)
    kind = str(attributes.get("openinference.span.kind") or attributes.get("span_kind") or "").upper()
    if (genai and str(attributes.get("gen_ai.operation.name", "")) not in _GENAI_CALLS) or kind not in ("", "LLM"):
        return Refused("span that is not a call of a model")
    record = _genai(attributes) if genai else _openinference(attributes)
    if record is None:
        return NO_CONTENT
    failed = attributes.get("status_code") == "ERROR" or dig(span, "status.code") in (2, "STATUS_CODE_ERROR")
    return replace(record, id=name, at=at, error="failed call" if failed or attributes.get("error.type") else "")


def _genai(a: Mapping[str, Any]) -> Record | None:
    asked = _parts(a.get("gen_ai.input.messages")) or _indexed(a, "gen_ai.prompt") or _old(a, "gen_ai.prompt", "user")
    said = _parts(a.get("gen_ai.output.messages"))
    said = said or _indexed(a, "gen_ai.completion") or _old(a, "gen_ai.completion", "assistant")
    system = decoded(a.get("gen_ai.system_instructions"))
    if not asked or not said:
        return None
    if system:
        text = _text(system) if isinstance(system, list) else str(system)
        asked = [{"role": "system", "content": text}, *asked]
    settings = {n: a.get(f"gen_ai.request.{n}") for n in ("temperature", "top_p", "top_k", "max_tokens")}
    finish = decoded(a.get("gen_ai.response.finish_reasons"))
    return Record(
        messages=tuple(asked),
        answer={**said[0], "role": "assistant"},
        model=str(a.get("gen_ai.response.model") or a.get("gen_ai.request.model") or ""),
        finish_reason=str(finish[0]) if isinstance(finish, list) and finish else "",
        **sampling(settings),
    )


def _parts(value: Any) -> list[Message]:
    """Messages of GenAI's form, whose content is in parts."""
    value = decoded(value)
    if not isinstance(value, list):
        return []
    return [_in_parts(m) for m in value if isinstance(m, Mapping)]


def _in_parts(value: Mapping[str, Any]) -> Message:
    if not isinstance(value.get("parts"), list):
        return message_of(value)
    parts = [p for p in value["parts"] if isinstance(p, Mapping)]
    calls = [
        {"id": p.get("id"), "type": "function", "function": {"name": p.get("name"), "arguments": p.get("arguments")}}
        for p in parts
        if p.get("type") == "tool_call"
    ]
    results = [p for p in parts if p.get("type") == "tool_call_response"]
    message = message_of({"role": value.get("role"), "content": _text(parts)})
    if calls:
        message["tool_calls"] = calls
    if results:
        result = results[0].get("response", results[0].get("result"))
        message |= {"role": "tool", "content": result if isinstance(result, str) else str(result)}
    return message


def _text(parts: Sequence[Any]) -> str:
    for part in parts:
        if part.get("type", "text") not in ("text", "tool_call", "tool_call_response", "reasoning"):
            raise NotText
    return "".join(str(p.get("content") or "") for p in parts if p.get("type", "text") == "text")


def _old(a: Mapping[str, Any], key: str, role: str) -> list[Message]:
    """`gen_ai.prompt` and `gen_ai.completion` of the first conventions: JSON messages, or text."""
    value = decoded(a.get(key))
    if isinstance(value, list):
        return [message_of(m) for m in value if isinstance(m, Mapping)]
    return [{"role": role, "content": value}] if isinstance(value, str) and value else []


def _indexed(a: Mapping[str, Any], prefix: str) -> list[Message]:
    """Messages flattened to `prefix.0.role`, `prefix.0.content`, with or without `message.` in front."""
    found: dict[int, dict[str, Any]] = {}
    for key, value in a.items():
        if key.startswith(f"{prefix}.") and (at := _FLAT.match(key[len(prefix) + 1 :])):
            found.setdefault(int(at[1]), {})[at[2].removeprefix("message.")] = value
    return [message_of(m) for _, m in sorted(found.items()) if "role" in m or "content" in m]


def _openinference(a: Mapping[str, Any]) -> Record | None:
    asked, said = _listed(a, "llm.input_messages"), _listed(a, "llm.output_messages")
    if (
        not asked
        and isinstance(value := dig(a, "input.value"), str)
        and dig(a, "input.mime_type") in (None, "text/plain")
    ):
        asked = [{"role": "user", "content": value}]
    if (
        not said
        and isinstance(value := dig(a, "output.value"), str)
        and dig(a, "output.mime_type") in (None, "text/plain")
    ):
        said = [{"role": "assistant", "content": value}]
    if not asked or not said:
        return None
    return Record(
        messages=tuple(asked),
        answer={**said[0], "role": "assistant"},
        model=str(dig(a, "llm.model_name") or ""),
        **sampling(dig(a, "llm.invocation_parameters")),
    )


def _listed(a: Mapping[str, Any], key: str) -> list[Message]:
    value = decoded(dig(a, key))
    if not isinstance(value, list):
        return _indexed(a, key)
    return [_openinference_message(m) for m in value if isinstance(m, Mapping)]


def _openinference_message(m: Mapping[str, Any]) -> Message:
    flat = {str(k).removeprefix("message."): v for k, v in (m.get("message") or m).items()}
    content = flat.get("content")
    if content is None and flat.get("contents"):
        parts = [
            {str(k).removeprefix("message_content."): v for k, v in (p.get("message_content") or p).items()}
            for p in flat["contents"]
        ]
        content = text_of(parts)
    calls = [_tool_call(c) for c in flat.get("tool_calls") or ()]
    message = {"role": flat.get("role"), "content": content, "tool_call_id": flat.get("tool_call_id")}
    return message_of({**message, "tool_calls": calls})


def _tool_call(call: Mapping[str, Any]) -> dict[str, Any]:
    flat = {str(k).removeprefix("tool_call."): v for k, v in (call.get("tool_call") or call).items()}
    function = flat.get("function")
    if not isinstance(function, Mapping):
        function = {"name": flat.get("function.name"), "arguments": flat.get("function.arguments")}
    return {"id": flat.get("id"), "type": "function", "function": dict(function)}
