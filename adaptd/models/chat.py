"""Messages to tokens with the model's own chat template: a prompt, and what a given answer to it would have been."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from adaptd.errors import RequestRefused


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids of a conversation, ready for the assistant's turn.

    Raises:
      RequestRefused: the tokenizer has no chat template, or the template refuses these messages.
    """
    return _ids(tokenizer, _text(tokenizer, messages, tools, template_kwargs, answered=False))


def render_answer(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    answer: Mapping[str, Any],
    tools: Sequence[Mapping[str, Any]] | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    *,
    ends: Collection[int],
    ended: bool = True,
) -> list[int]:
    """Token ids that the model would have decoded for this answer, behind `render_chat` of the messages.

    What the template writes behind its own prompt is taken, since tool calls and reasoning have a form of their own there.
    A template that writes something else there (many drop the reasoning of earlier turns) gives no tool calls; a text
    answer is then the content alone.

    Args:
      answer: an assistant message.
      ends: tokens that end an answer; what the template writes behind the first is not the model's.
      ended: whether the answer came to its end; one that was cut off has no end token.

    Raises:
      RequestRefused: as `render_chat`; or the tool calls cannot be rendered.
    """
    prompt = _text(tokenizer, messages, tools, template_kwargs, answered=False)
    whole = _text(tokenizer, [*messages, answer], tools, template_kwargs, answered=True)
    if whole.startswith(prompt):
        ids = _ids(tokenizer, whole[len(prompt) :])
    elif answer.get("tool_calls"):
        raise RequestRefused("this model's chat template does not write tool calls behind its own prompt")
    else:
        ids = _ids(tokenizer, str(answer.get("content") or ""))
    last = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    if not ended:
        return ids[:last]
    end = [ids[last]] if last < len(ids) else sorted(ends)[:1]
    return [*ids[:last], *end]


def render_template(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]]) -> str:
    """The text of a conversation, ready for the assistant's turn.

    Raises:
      RequestRefused: as `render_chat`.
    """
    return _text(tokenizer, messages, None, None, answered=False)


def _text(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    template_kwargs: Mapping[str, Any] | None,
    *,
    answered: bool,
) -> str:
    if tokenizer.chat_template is None:
        raise RequestRefused("this model has no chat template: send a plain prompt to /v1/completions")
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tools=[dict(tool) for tool in tools] if tools else None,
            add_generation_prompt=not answered,
            tokenize=False,
            **(template_kwargs or {}),
        )
    except (TemplateError, TypeError, ValueError) as error:  # templates call functions on what they are given
        raise RequestRefused(f"the model's chat template refuses these messages: {error}") from error
    return str(text)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # The template writes the special tokens itself.
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def with_arguments(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message with its tool calls' arguments as objects, as templates expect them, where they are JSON text."""
    if not message.get("tool_calls"):
        return dict(message)
    return {**message, "tool_calls": [_with_arguments(call) for call in message["tool_calls"]]}


def _with_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    function = dict(call.get("function") or {})
    if isinstance(function.get("arguments"), str):
        try:
            function["arguments"] = json.loads(function["arguments"])
        except ValueError:
            return dict(call)
    return {**call, "function": function}
