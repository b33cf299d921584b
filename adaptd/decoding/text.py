"""Tokens to text while they arrive: no half characters, and nothing shown that a stop string would take back."""

from __future__ import annotations

from collections.abc import Sequence

from adaptd.decoding.request import Detokenize

#: What a tokenizer prints for bytes that are not yet a whole character.
_REPLACEMENT = "\ufffd"
#: Tokens decoded together at most before the window moves on; keeps the cost of a round constant.
_WINDOW = 64
#: Tokens kept as context when the window moves (some tokenizers drop a leading space at the start of a text).
_CONTEXT = 8


class TextStream:
    """Text of one row, released piece by piece.

    Text is held back while its end is an incomplete character or could be the beginning of a stop string.
    """

    def __init__(self, detokenize: Detokenize, stop: Sequence[str] = ()) -> None:
        self._detokenize = detokenize
        self._stop = tuple(stop)
        self._longest = max((len(text) for text in self._stop), default=0)
        self._ids: list[int] = []
        self._start = 0
        self._decoded = ""
        self._held = ""
        self._released: list[str] = []

    @property
    def text(self) -> str:
        """Everything released so far."""
        return "".join(self._released)

    def push(self, ids: Sequence[int]) -> tuple[str, int | None]:
        """Takes the tokens of a round.

        Returns: the text released, and how many of these tokens the answer needs until a stop string is complete
        (None if there is none). After a stop nothing more may be pushed.
        """
        before = (len(self._ids), self._start, self._decoded, self._held)
        cut = self._extend(ids)
        if cut is None:
            return self._release(len(self._held) - self._undecided()), None
        needed = len(ids)
        # Only now, at the end of a row, is it worth knowing which token completed the stop string.
        for count in range(1, len(ids)):
            self._rewind(*before)
            earlier = self._extend(ids[:count])
            if earlier is not None:
                cut, needed = earlier, count
                break
        else:
            self._rewind(*before)
            self._extend(ids)
        released = self._release(cut)
        self._held = ""
        return released, needed

    def flush(self) -> str:
        """Releases what is held back, for a row that ended without a stop string."""
        self._held += self._detokenize(self._ids[self._start :])[len(self._decoded) :]
        return self._release(len(self._held))

    def _extend(self, ids: Sequence[int]) -> int | None:
        """Adds tokens; returns where the earliest stop string begins in the held text, None if there is none."""
        self._ids.extend(ids)
        window = self._detokenize(self._ids[self._start :])
        if window.endswith(_REPLACEMENT):
            return None
        self._held += window[len(self._decoded) :]
        self._decoded = window
        if len(self._ids) - self._start > _WINDOW:
            self._start = len(self._ids) - _CONTEXT
            self._decoded = self._detokenize(self._ids[self._start :])
        found = [at for text in self._stop if (at := self._held.find(text)) >= 0]
        return min(found, default=None)

    def _rewind(self, count: int, start: int, decoded: str, held: str) -> None:
        del self._ids[count:]
        self._start, self._decoded, self._held = start, decoded, held

    def _undecided(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        for size in range(min(self._longest - 1, len(self._held)), 0, -1):
            tail = self._held[-size:]
            if any(text.startswith(tail) for text in self._stop):
                return size
        return 0

    def _release(self, size: int) -> str:
        released, self._held = self._held[:size], self._held[size:]
        if released:
            self._released.append(released)
        return released
