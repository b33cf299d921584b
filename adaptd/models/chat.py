"""Messages to prompt tokens with the model's own chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from adaptd.errors import RequestRefused


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> list[int]:
    """Token ids of a conversation, ready for the assistant's turn.

    Raises:
      RequestRefused: the tokenizer has no chat template, or the template refuses these messages.
    """
    if tokenizer.chat_template is None:
        raise RequestRefused("this model has no chat template: send a plain prompt to /v1/completions")
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tools=[dict(tool) for tool in tools] if tools else None,
            add_generation_prompt=True,
            tokenize=False,
        )
    except TemplateError as error:
        raise RequestRefused(f"the model's chat template refuses these messages: {error}") from error
    # The template writes the special tokens itself.
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids
