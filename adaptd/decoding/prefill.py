"""Reading prompts: in chunks, beside the rows that are being answered, and not twice what another prompt began with.

Requests that join together are a group in the slots behind the active rows, sorted by length, so that the shortest, which
is ready first, is the next one to become active. Positions < n-1 of a prompt are read: a round feeds the last token.

Prefix reuse: what a slot's target cache holds is known by its tokens, also after its request has ended, until something
else is written there. A new prompt that begins like one of them gets those positions copied (or finds them in place) and
is read from there on. Only the target's: the draft's keys depend on its weights and on the request gate, and it is
read in a small part of the time.

Admission: while rows are being answered, a chunk is as long as the target reads in about `STALL` rounds, so that a long
prompt delays their next tokens by a bounded factor.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from adaptd.decoding.row import Row
from adaptd.decoding.runner import ModelRunner
from adaptd.models.cache import round_up

#: Rounds that one chunk may take while others are answered.
STALL = 4.0
#: Rounds that one pass may take while nobody is here: who comes then waits for half of it on average.
PASS = 0.5
#: Shortest chunk for the sake of the others: shorter ones read weights for hardly anything.
_LEAST_CHUNK = 16
#: Weight of a new measurement in the running mean.
_NEW = 0.2


class SlotTokens:
    """Tokens whose keys and values each slot's target cache holds, from position 0 on."""

    def __init__(self, slots: int) -> None:
        self._held: list[Sequence[int]] = [()] * slots

    def hold(self, slot: int, tokens: Sequence[int]) -> None:
        """From now on that slot holds these."""
        self._held[slot] = tokens

    def longest(self, prompt: Sequence[int], also: Sequence[Sequence[int]]) -> tuple[int, int]:
        """The slot whose tokens begin with most of the prompt, and with how many; `also` stands for the first slots."""
        best = (0, 0)
        for slot, held in enumerate([*also, *self._held[len(also) :]]):
            found = _common(prompt, held)
            if found > best[1]:
                best = (slot, found)
        return best


class Prefill:
    """Rows that wait for a slot's prompt to be read.

    Args:
      target, draft: both caches are written.
      to_draft: tokens the draft has embeddings for.
      tokens: most prompt tokens read a step, over all rows of a group.
      reuse: whether prefixes are reused.
      clock: monotonic seconds.
    """

    def __init__(
        self,
        target: ModelRunner,
        draft: ModelRunner,
        to_draft: Callable[[Tensor], Tensor],
        *,
        slots: int,
        tokens: int,
        reuse: bool,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._target, self._draft, self._to_draft = target, draft, to_draft
        self._tokens, self._clock = tokens, clock
        self._slots = SlotTokens(slots) if reuse else None
        self.waiting: deque[Row] = deque()
        """Not begun."""
        self.group: list[Row] = []
        """Being read, in slots from `slot` on."""
        self.slot = 0
        self._done = self._skipped = 0
        self._token_s = self._round_s = 0.0

    def __len__(self) -> int:
        return len(self.group) + len(self.waiting)

    @property
    def reuses(self) -> bool:
        """Whether it is known what slots hold."""
        return self._slots is not None

    def short_chunk(self, rounds: float) -> int:
        """Positions that the target reads in the time of about so many rounds, for what others may have to wait for."""
        if not self._token_s:
            return _LEAST_CHUNK
        return min(self._tokens, max(_LEAST_CHUNK, round(rounds * self._round_s / self._token_s)))

    def played(self, seconds: float) -> None:
        """A round over the active rows took so long."""
        self._round_s = _mean(self._round_s, seconds)

    def left(self, slot: int, row: Row) -> None:
        """A row has ended or moved away; what its slot holds stays there until it is written again."""
        if self._slots is not None:
            self._slots.hold(slot, row.tokens[:-1])

    def forget(self, slot: int) -> None:
        """Something else was written into a slot."""
        if self._slots is not None:
            self._slots.hold(slot, ())

    def drop_aborted(self) -> None:
        """Reads no further where nobody waits for any of the group any more."""
        if all(row.aborted for row in self.group):
            self.group = []

    def step(self, active: Sequence[Row]) -> tuple[list[Row], int]:
        """Reads the next chunk.

        Args:
          active: rows of the slots in front of the group.
        Returns: rows of the group that are through, in order, and the slot of the first.
        """
        if not self.group:
            if not self.waiting:
                return [], len(active)
            self._begin(active)
        wanted = self.group[-1].prompt_len - 1
        if wanted > self._done:
            stop = min(wanted, self._done + self._chunk(bool(active)))
            self._read(self._done, stop)
            self._done = stop
        ready = 0
        while ready < len(self.group) and self.group[ready].prompt_len - 1 <= self._done:
            ready += 1
        through, self.group = self.group[:ready], self.group[ready:]
        first, self.slot = self.slot, self.slot + ready
        return through, first

    def _begin(self, active: Sequence[Row]) -> None:
        self.group = sorted(self.waiting, key=lambda row: row.prompt_len)
        self.waiting.clear()
        self._done, self._skipped, self.slot = 0, 0, len(active)
        if self._slots is None:
            return
        held = [row.tokens[:-1] for row in active]
        found = [self._slots.longest(row.tokens[:-1], held) for row in self.group]
        self._skipped = min(length for _, length in found)
        for row in self.group:
            row.cached = self._skipped
        if self._skipped:
            # All are read before any is written: a slot of the group may be another's source.
            self._target.cache.move(
                [slot for slot, _ in found], range(self.slot, self.slot + len(found)), self._skipped
            )

    def _chunk(self, others: bool) -> int:
        """Positions of each row to read now."""
        tokens = self.short_chunk(STALL) if others and self._token_s else self._tokens
        # What the target has is read by the draft alone, in a fraction of the time.
        return max(1, tokens // len(self.group)) + max(0, self._skipped - self._done)

    @torch.inference_mode()
    def _read(self, start: int, stop: int) -> None:
        """Writes positions start .. stop - 1 of the group; shorter rows write padding behind their end."""
        self._draft.open_to(self.group)
        self._pass(self._draft, start, stop)
        start = max(start, self._skipped)
        if start < stop:
            began = self._clock()
            self._pass(self._target, start, stop)
            self._token_s = _mean(self._token_s, (self._clock() - began) / ((stop - start) * len(self.group)))
        for slot, row in enumerate(self.group, self.slot):
            size = min(stop, row.prompt_len - 1)
            if self._slots is not None:
                self._slots.hold(slot, row.tokens[:size])

    @torch.inference_mode()
    def fetch(self, text: Sequence[int]) -> tuple[int, int]:
        """One chunk of a text into the target's cache, while there are no rows.

        Returns: the slot that holds its beginning, and the positions that were missing. If that is 0, the caller may write
          behind the text.
        """
        if self._slots is None:
            raise RuntimeError("what slots hold is not known without prefix reuse")
        slot, done = self._slots.longest(text, ())
        if done == len(text):
            self._slots.hold(slot, text)
            return slot, 0
        stop = min(len(text), done + self.short_chunk(PASS))
        positions = torch.arange(done, stop, device=self._target.device)[None]
        tokens, length = torch.tensor([text[done:stop]], device=self._target.device), round_up(stop)
        self._slots.hold(slot, ())
        self._target.forward(tokens, positions, self._target.masks(positions, length), slot, length, last_only=True)
        self._slots.hold(slot, text[:stop])
        return slot, len(text) - done

    def catch_up(self, rows: Sequence[Row]) -> None:
        """The draft reads what rounds without it left behind: positions up to n-3 of active rows with n tokens."""
        behind, width = max(row.behind for row in rows), max(1, self._tokens // len(rows))
        for first in range(-behind, 0, width):
            # Rows that lack fewer, or have fewer, write again what is there.
            places = [[max(0, len(row.tokens) - 2 + at) for at in range(first, min(0, first + width))] for row in rows]
            read = [[row.tokens[at] for at in where] for row, where in zip(rows, places, strict=True)]
            tokens, positions = (torch.tensor(values, device=self._draft.device) for values in (read, places))
            length = round_up(max(len(row.tokens) for row in rows))
            self._draft.open_to(rows)
            masks = self._draft.masks(positions, length)
            self._draft.forward(self._to_draft(tokens), positions, masks, 0, length, last_only=True)

    def _pass(self, runner: ModelRunner, start: int, stop: int) -> None:
        width, chunks = stop - start, [row.tokens[start:stop] for row in self.group]
        padded = torch.tensor([chunk + [0] * (width - len(chunk)) for chunk in chunks], device=runner.device)
        positions = torch.arange(start, stop, device=runner.device).expand(len(chunks), width)
        length = round_up(stop)
        tokens = self._to_draft(padded) if runner is self._draft else padded
        runner.forward(tokens, positions, runner.masks(positions, length), self.slot, length, last_only=True)


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the common beginning."""
    size = min(len(first), len(second))
    if first[:size] == second[:size]:
        return size
    low, high = 0, size
    while high - low > 1:  # first[:low] agrees, first[:high] does not
        middle = (low + high) // 2
        low, high = (middle, high) if first[:middle] == second[:middle] else (low, middle)
    return low


def _mean(known: float, new: float) -> float:
    return known + (_NEW * (new - known) if known else new)
