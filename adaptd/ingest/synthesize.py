"""Queries without logs: the target completes its own pre-query template (Magpie, Xu et al. 2024), filtered.

A chat model's template has a place where the user's words go. Given all that stands in front of it, an aligned model writes
what a user would write there.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from adaptd.errors import ConfigError
from adaptd.ingest.record import Message
from adaptd.models.chat import render_template

#: Stands for the user's words while the template is taken apart.
_MARK = "\u2063adaptd-query\u2063"


@dataclass(frozen=True, slots=True)
class PreQuery:
    """Where a query is written."""

    prompt: tuple[int, ...]
    """Tokens in front of it."""
    ends: frozenset[int]
    """Tokens that end it."""


def pre_query(tokenizer: PreTrainedTokenizerBase, system: str, ends: Collection[int]) -> PreQuery:
    """The template up to the user's words.

    Args:
      system: text of a system message; empty for none.
      ends: tokens that end an answer; with the first special token behind the user's words they end a query.

    Raises:
      ConfigError: the template does not write the user's words as they are.
      RequestRefused: there is no template, or it refuses a system message.
    """
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    text = render_template(tokenizer, [*messages, {"role": "user", "content": _MARK}])
    before, mark, behind = text.partition(_MARK)
    if not mark:
        raise ConfigError(
            "the target's chat template does not write a user's words as they are: synthesis needs logs' queries"
        )
    prompt = tokenizer(before, add_special_tokens=False)["input_ids"]
    special = set(tokenizer.all_special_ids)
    closing = next((i for i in tokenizer(behind, add_special_tokens=False)["input_ids"] if i in special), None)
    return PreQuery(tuple(prompt), frozenset(ends) | ({closing} if closing is not None else frozenset()))


@dataclass(slots=True)
class Filters:
    """Which queries are kept; remembers those that were, for duplicates.

    Args:
      min_tokens: of a query; the longest is what the decoder was allowed.
      repeats: an n-gram of `ngram` tokens may stand so often in one query.
    """

    min_tokens: int = 4
    ngram: int = 4
    repeats: int = 4
    _seen: set[int] = field(default_factory=set)

    def refuse(self, ids: Sequence[int], text: str, *, ended: bool) -> str:
        """Why a query is left out, in a few words; empty if it is kept."""
        if not ended:
            return "longer than --max-query"
        if len(ids) < self.min_tokens or not text.strip():
            return "shorter than a question"
        if not text.isprintable() and any(
            unicodedata.category(c) in ("Cc", "Co", "Cn") and c not in "\n\t\r" for c in text
        ):
            return "characters that are no text"
        grams = Counter(tuple(ids[i : i + self.ngram]) for i in range(len(ids) - self.ngram + 1))
        if grams and max(grams.values()) > self.repeats:
            return "repeats itself"
        # A hash of 64 bits: a million queries collide with a chance of one in forty million.
        key = hash(" ".join(text.lower().split()))
        if key in self._seen:
            return "a duplicate"
        self._seen.add(key)
        return ""
