"""A conversation to one record for each turn of the assistant, with the context that this turn had."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from adaptd.ingest.record import NO_CONTENT, Item, Message, Record


def turns(about: Record, conversation: Sequence[Message], skip: frozenset[int] = frozenset()) -> Iterator[Item]:
    """Records of a conversation; one that nobody answered is a question alone.

    Args:
      about: what is common to all; `id` gets the turn's number behind it where there are several.
      conversation: messages in order.
      skip: positions of assistant messages that are context only.
    """
    at = [i for i, m in enumerate(conversation) if m["role"] == "assistant" and i > 0 and i not in skip]
    if not at and conversation and conversation[-1]["role"] != "assistant":
        yield dataclasses.replace(about, messages=tuple(conversation))
        return
    if not at:
        yield NO_CONTENT
    for turn, index in enumerate(at):
        name = f"{about.id}-{turn}" if about.id and len(at) > 1 else about.id
        yield dataclasses.replace(
            about, id=name, messages=tuple(conversation[:index]), answer=dict(conversation[index])
        )
