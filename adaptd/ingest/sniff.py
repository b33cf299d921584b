"""What format a row is of, by what it holds; names of files say nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from adaptd.ingest.formats import batch, chat, langfuse, litellm, openai_pair, plain, sglang, spans, vllm_log
from adaptd.ingest.record import Item


class Format(Protocol):
    """A reader of one format."""

    @property
    def NAME(self) -> str:  # noqa: N802 (a constant of each module)
        """For people."""

    def matches(self, row: Mapping[str, Any], /) -> bool:
        """Whether the row is of this format."""

    def read(self, row: Mapping[str, Any], /) -> Iterator[Item]:
        """What the row holds.

        Raises:
          NotText: content that is not text.
        """


#: The most particular first: several formats carry `messages` or a `prompt` somewhere.
FORMATS: Sequence[Format] = (
    vllm_log,
    spans,
    sglang,
    litellm,
    batch,
    langfuse,
    openai_pair,
    chat,
    plain,
)
_ARRIVALS = ({"timestamp", "input_length", "output_length"}, {"Timestamp", "Request tokens", "Response tokens"},
             {"TIMESTAMP", "ContextTokens", "GeneratedTokens"})  # fmt: skip


def sniff(row: Mapping[str, Any], likely: Format | None = None) -> Format | None:
    """The format of a row, None if it is of none; `likely`, the last row's, is asked first."""
    if likely is not None and likely.matches(row):
        return likely
    return next((f for f in FORMATS if f.matches(row)), None)


def unknown(row: Mapping[str, Any]) -> str:
    """Rule and remedy for a row of no known format; names columns, never values."""
    if any(columns <= set(row) for columns in _ARRIVALS):
        return "holds arrival times and lengths only: there is no text to learn from"
    names = ", ".join(sorted(map(str, row))[:12]) or "none"
    return (
        f"is of no known format (its columns: {names[:200]}): name them with --map prompt=COLUMN --map response=COLUMN"
    )
