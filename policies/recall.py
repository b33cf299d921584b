"""Recall: what the target said when it stood behind the same last few tokens, mixed into the draft's proposals.

A draft learns by gradient steps, over minutes. A table of the target's own distributions by context needs to see a
context once, and forgets nothing that still fits. Both are proposals, so the mixture is one too: verification tests a
token against the distribution that it was drawn from, and output stays exactly the target's.

Sources, in the order they are mixed in:
* for each n of `orders`, the mean of the distributions that were served behind the same last n tokens (an n-gram model
  with whole distributions in the place of counts);
* for each n of `echo`, the tokens that followed the last n tokens earlier in the same text (prompt lookup).

Source s turns the mixture so far into (1 - w) mixture + w source. Its weight w is chosen by what happened: for every
domain, source, number of observations and certainty, the w whose proposals would have been accepted most often lately
(follow the leader, with a decay; Cesa-Bianchi and Lugosi 2006, chapter 2). By domain, because a draft that knows one
domain by heart and hardly another needs the table here and not there: traffic that comes back finds its weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

#: Weights that a source may have.
GRID = (0.0, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.97)
#: The weight a source begins with, before any evidence.
_FIRST = 1
#: Decay of the evidence for each position judged: about the last five hundred of its kind count.
_DECAY = 0.998
#: Domains with weights of their own; those that come later share the first one's.
_DOMAINS = 32
#: Places where one context may lie; the one written longest ago gives way.
_WAYS = 4
#: Latest matches of an echo that count.
_ECHOES = 8
#: Classes of observations (1, 2-3, 4-7, 8-15, 16 and more) and of certainty (quarters of the largest probability).
_COUNTS, _PEAKS = 5, 4
#: Least share of a new observation in the mean: what was served last week fades.
_FLOOR = 1 / 64


@dataclass(frozen=True, slots=True)
class Recalled:
    """What S sources say at N positions."""

    ids: Tensor
    """int64 [N, S, M]; one token may stand there several times, its probabilities add up."""
    probs: Tensor
    """float32 [N, S, M], rows sum to 1, or to 0 where the source knows nothing."""
    weights: Tensor
    """float32 [N, S], each source's weight against the mixture of those before it."""
    kinds: Tensor
    """int64 [N, S], class of domain, source, observations and certainty; the last class of a domain: knows nothing."""

    def at(self, token_ids: Tensor) -> Tensor:
        """Each source's probability of one token a position: float32 [N, S]."""
        return ((self.ids == token_ids[:, None, None]) * self.probs).sum(-1)

    def shares(self) -> tuple[Tensor, Tensor]:
        """Final shares of the draft [N] and of each source [N, S] in the mixture; they sum to 1."""
        # What is left of each after the sources behind it have taken theirs.
        after = (1 - self.weights).flip(1).cumprod(1).flip(1)
        behind = torch.cat((after[:, 1:], torch.ones_like(after[:, :1])), 1)
        return after[:, 0], self.weights * behind

    def mixed_at(self, q: Tensor, token_ids: Tensor) -> Tensor:
        """Probability of one token a position in the mixture, from the draft's `q` of it: float32 [N]."""
        draft, sources = self.shares()
        return draft * q + (sources * self.at(token_ids)).sum(1)


class Recall:
    """A bounded table of served distributions by context, and the weights of its sources.

    Args:
      orders: lengths of the contexts of the table, in tokens.
      echo: lengths of the contexts that are looked up in the text itself.
      entries: contexts kept, over all orders; rounded up to a power of two.
      width: most likely tokens kept of each distribution.
      seeded: mix into sampled requests with a seed as well; they then repeat only while the table is the same.
    Raises: ValueError: a length, `entries` or `width` below 1, or no source at all.
    """

    def __init__(
        self,
        *,
        orders: Sequence[int] = (1, 2, 3, 4),
        echo: Sequence[int] = (2, 3),
        entries: int = 2**18,
        width: int = 32,
        seeded: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        for name, values in (("orders", orders), ("echo", echo), ("entries", [entries]), ("width", [width])):
            if any(v < 1 for v in values):
                raise ValueError(f"{name} ({', '.join(map(str, values))}) must be at least 1")
        if not orders and not echo:
            raise ValueError(
                "orders and echo are both empty: there is nothing to recall from; give one of them a length"
            )
        self.orders, self.echo = tuple(sorted(orders)), tuple(sorted(echo))
        self._width, self.seeded = width, seeded
        sets = 1 << max(0, (entries - 1).bit_length() - _WAYS.bit_length() + 1)
        self._mask, self.capacity = sets - 1, sets * _WAYS
        self._key = torch.zeros(sets, _WAYS, dtype=torch.int64, device=device)
        self._count = torch.zeros(sets, _WAYS, device=device)
        self._written = torch.full((sets, _WAYS), -1, dtype=torch.int64, device=device)
        self._ids = torch.zeros(sets, _WAYS, width, dtype=torch.int32, device=device)
        self._probs = torch.zeros(sets, _WAYS, width, dtype=torch.float16, device=device)
        self._owner = torch.zeros(sets, dtype=torch.int64, device=device)
        self._tick = 0
        self.sources = len(self.orders) + len(self.echo)
        self._grid = torch.tensor(GRID, device=device)
        self._slots: dict[str, int] = {}
        self._classes = self.sources * _COUNTS * _PEAKS + 1
        self._gains = torch.zeros(_DOMAINS * self._classes, len(GRID), device=device)
        # Evidence of less than one position decides nothing, more than that decides everything.
        self._gains[:, _FIRST] = 1e-3
        self._best = torch.zeros(len(self._gains), dtype=torch.int64, device=device)
        self._choose()

    @property
    def device(self) -> torch.device:
        """Where the table lies."""
        return self._key.device

    @property
    def nbytes(self) -> int:
        """Bytes of the table, all of them from the start."""
        tensors = (self._key, self._count, self._written, self._ids, self._probs, self._owner)
        return sum(t.numel() * t.element_size() for t in tensors)

    def __len__(self) -> int:
        """Contexts known now."""
        return int((self._written >= 0).sum())

    @property
    def looked_at(self) -> tuple[tuple[Tensor, ...], tuple[int, ...], tuple[int, ...], int]:
        """What a `look` reads: its tensors, which are written in place, orders, echoes, and classes of a domain.

        The tensors: keys and counts [sets, ways], ids and probs [sets, ways, width], best weight of each class, the weights.
        """
        tensors = self._key, self._count, self._ids, self._probs, self._best, self._grid
        return tensors, self.orders, self.echo, self._classes

    def slot(self, domain: str) -> int:
        """Number of a domain's weights: the same for the same name; 0 once there are too many."""
        if domain not in self._slots and len(self._slots) < _DOMAINS:
            self._slots[domain] = len(self._slots)
        return self._slots.get(domain, 0)

    # -- reading -------------------------------------------------------------------------------------------------

    def look(self, history: Tensor, length: Tensor, slots: Tensor | None = None) -> Recalled:
        """What is known of the token at index `length` of each history.

        Args:
          history: int64 [N, L], tokens; what lies at or behind `length` is not read.
          length: int64 [N], in 1..L.
          slots: int64 [N], whose weights to use (`slot`); None: number 0.
        """
        found = [self._look_up(self._keys(history, length))] if self.orders else []
        found += [_echoes(history, length, n, self._width) for n in self.echo]
        ids, probs, count = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
        kinds = self._kinds(ids, probs, count)
        if slots is not None:
            kinds = kinds + slots[:, None] * self._classes
        return Recalled(ids, probs, self._grid[self._best[kinds]], kinds)

    def _keys(self, history: Tensor, length: Tensor) -> Tensor:
        """Hashes of the last n tokens for each order, int64 [N, orders]; 0 where there are not that many."""
        width = max(self.orders)
        back = torch.arange(1, width + 1, device=history.device)
        at = length[:, None] - back
        tokens = history.gather(1, at.clamp_min(0))
        mixed, keys = torch.zeros_like(length), []
        for n in range(1, width + 1):
            mixed = (mixed ^ (tokens[:, n - 1] + 1)) * -7046029254386353131
            mixed = mixed ^ (mixed >> 32)
            if n in self.orders:
                keys.append(torch.where(length >= n, (mixed * (2 * n + 1)) | 1, 0))
        return torch.stack(keys, 1)

    def _sets(self, keys: Tensor) -> Tensor:
        return (keys >> 20) & self._mask

    def _look_up(self, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        sets = self._sets(keys)
        hit = (self._key[sets] == keys[..., None]) & (keys[..., None] != 0)
        way = hit.int().argmax(-1)
        known = hit.any(-1)
        probs = self._probs[sets, way].float() * known[..., None]
        probs = probs / probs.sum(-1, keepdim=True).clamp_min(1e-9)
        return self._ids[sets, way].long(), probs, self._count[sets, way] * known

    def _kinds(self, ids: Tensor, probs: Tensor, count: Tensor) -> Tensor:
        seen = count.clamp_min(1).log2().long().clamp_max(_COUNTS - 1)
        peak = probs.amax(-1)
        if self.echo:
            # Echoes name one token several times; its share is the sum.
            parts = ids[:, -len(self.echo) :, :_ECHOES], probs[:, -len(self.echo) :, :_ECHOES]
            same = parts[0][..., :, None] == parts[0][..., None, :]
            peak[:, -len(self.echo) :] = (same * parts[1][..., None, :]).sum(-1).amax(-1)
        certain = (peak * _PEAKS).long().clamp_max(_PEAKS - 1)
        source = torch.arange(self.sources, device=ids.device)
        return torch.where(count > 0, (source * _COUNTS + seen) * _PEAKS + certain, self._classes - 1)

    def mix(self, q: Tensor, recalled: Recalled) -> Tensor:
        """The draft's distribution with the sources mixed in.

        Args:
          q: float32 [N, V], rows sum to 1.
        Returns: float32 [N, V], rows sum to 1.
        """
        draft, sources = recalled.shares()
        added = (recalled.probs * sources[..., None]).flatten(1)
        return (q * draft[:, None]).scatter_add(1, recalled.ids.flatten(1), added)

    # -- learning ------------------------------------------------------------------------------------------------

    def learn(self, recalled: Recalled, q: Tensor, p: Tensor, token_ids: Tensor, reached: Tensor) -> None:
        """Evidence for each weight, from what the target emitted.

        For x drawn from p, min(1, q(x) / p(x)) is an unbiased estimate of the overlap of p and q: the acceptance.

        Args:
          recalled: what was known, N positions.
          q: float32 [N], the draft's own probability of the emitted token.
          p: float32 [N], the target's served probability of it, above 0.
          token_ids: int64 [N], emitted.
          reached: bool [N]; positions that were not are not read.
        """
        theirs, mixed = recalled.at(token_ids), q
        before = []
        for weight, theirs_at in zip(recalled.weights.unbind(1), theirs.unbind(1), strict=True):
            before.append(mixed)
            mixed = (1 - weight) * mixed + weight * theirs_at
        scores = torch.lerp(torch.stack(before, 1)[..., None], theirs[..., None], self._grid) / p[:, None, None]
        kind = torch.where(reached[:, None], recalled.kinds, self._classes - 1).flatten()
        # A kind is one source's, so all sources at once are what one after the other would be.
        seen = torch.zeros_like(self._gains[:, 0]).index_add_(0, kind, torch.ones_like(scores[..., 0]).flatten())
        self._gains *= _DECAY ** seen[:, None]
        self._gains.index_add_(0, kind, scores.clamp_max(1.0).nan_to_num(0.0).flatten(0, 1))
        self._choose()

    def _choose(self) -> None:
        # A source that knows nothing has weight 0 whatever was booked under it.
        nothing = self._gains[self._classes - 1 :: self._classes]
        nothing.zero_()
        nothing[:, 0] = 1.0
        # In place: a captured look reads it where it is.
        torch.argmax(self._gains, -1, out=self._best)

    def observe(self, history: Tensor, length: Tensor, ids: Tensor, probs: Tensor) -> None:
        """Keep the distributions that were served behind these contexts.

        Args:
          history, length: as in `look`; N positions.
          ids: int64 [N, K], distinct within a row.
          probs: float32 [N, K], the served distribution's at these tokens.
        """
        if not self.orders or not len(length):
            return
        keys = self._keys(history, length)
        for order in range(keys.shape[1]):
            waiting = torch.nonzero(keys[:, order])[:, 0]
            while len(waiting):
                # One observation a set at a time: the first of those that wait.
                sets = self._sets(keys[waiting, order])
                self._owner[sets] = torch.iinfo(torch.int64).max
                self._owner.scatter_reduce_(0, sets, waiting, "amin")
                first = self._owner[sets] == waiting
                chosen = waiting[first]
                self._write(keys[chosen, order], ids[chosen], probs[chosen])
                waiting = waiting[~first]

    def _write(self, keys: Tensor, ids: Tensor, probs: Tensor) -> None:
        """Observations of contexts in different sets."""
        sets = self._sets(keys)
        hit = self._key[sets] == keys[:, None]
        known = hit.any(-1)
        way = torch.where(known, hit.int().argmax(-1), self._written[sets].argmin(-1))
        count = self._count[sets, way] * known + 1
        rate = (1 / count).clamp_min(_FLOOR)[:, None]
        old_ids = self._ids[sets, way]
        old = self._probs[sets, way].float() * known[:, None] * (1 - rate)
        ids, new = ids.int(), probs * rate
        same = (old_ids[:, :, None] == ids[:, None, :]) & (old[:, :, None] > 0)
        merged = torch.cat((old + (same * new[:, None, :]).sum(-1), new * ~same.any(1)), 1)
        best = merged.topk(self._width, dim=1)
        self._key[sets, way] = keys
        self._count[sets, way] = count
        self._written[sets, way] = self._tick
        self._ids[sets, way] = torch.cat((old_ids, ids), 1).gather(1, best.indices)
        self._probs[sets, way] = best.values.half()
        self._tick += 1


def _echoes(history: Tensor, length: Tensor, n: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens that followed the last `n` tokens earlier in each history: ids, probabilities [N, 1, width], count [N, 1]."""
    rows, size = history.shape
    index = torch.arange(size, device=history.device)
    same = (index >= n) & (index < length[:, None])
    for back in range(1, n + 1):
        last = history.gather(1, (length[:, None] - back).clamp_min(0))
        same[:, back:] &= history[:, : size - back] == last
    kept = min(_ECHOES, size, width)
    at = torch.where(same, index, -1).topk(kept, dim=1).values
    known = at >= 0
    ids = torch.zeros(rows, width, dtype=torch.int64, device=history.device)
    probs = torch.zeros(rows, width, device=history.device)
    count = known.sum(1, keepdim=True)
    ids[:, :kept] = history.gather(1, at.clamp_min(0))[:, :kept]
    probs[:, :kept] = (known / count.clamp_min(1))[:, :kept]
    return ids[:, None], probs[:, None], count.float()
