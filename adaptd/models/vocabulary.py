"""The text of single tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase


def token_texts(tokenizer: PreTrainedTokenizerBase) -> Callable[[Sequence[int]], list[str]]:
    """Gives the text of each of several tokens, with its leading space where it has one; of a special token none."""

    def texts(ids: Sequence[int]) -> list[str]:
        if not ids:  # decoded, no sequence at all is one empty text
            return []
        found: list[str] = tokenizer.batch_decode([[i] for i in ids], skip_special_tokens=True)
        return found

    return texts
