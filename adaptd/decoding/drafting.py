"""The proposals of a round: k passes of the draft and the choices between them, on a GPU as one captured graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from adaptd.decoding.graphs import Given, Graphs
from adaptd.decoding.recall import Asked, RecallRound
from adaptd.decoding.runner import ModelRunner, columns
from adaptd.decoding.sampling import RowParams, choose
from policies.recall import Recalled


class Proposals(NamedTuple):
    """k proposals for B rows, and what they were drawn from."""

    tokens: Tensor
    """int64 [B, k]."""
    logits: Tensor
    """float32 [B, k, V], the draft's, in the target's vocabulary."""
    q: Tensor | None
    """float32 [B, k, V], what each was drawn from; None if every row is greedy and there is no recall."""
    own: Tensor | None
    """float32 [B, k, V], the draft's part of q; None without recall."""
    recalled: Recalled | None
    """The rest of it, with a dimension k behind the rows; None without recall."""

    def tensors(self) -> list[Tensor]:
        """Those that are there, in order."""
        recalled = [] if self.recalled is None else [getattr(self.recalled, name) for name in Recalled.__slots__]
        return [tensor for tensor in (self.tokens, self.logits, self.q, self.own) if tensor is not None] + recalled


class Drafter:
    """Asks the draft, and the recall beside it.

    Args:
      runner: of the draft.
      vocab_size: V, the target's.
      recall: None: the draft alone.
    """

    def __init__(self, runner: ModelRunner, vocab_size: int, recall: RecallRound | None) -> None:
        self._runner, self._vocab, self._recall = runner, vocab_size, recall

    def propose(
        self,
        k: int,
        n: Tensor,
        last_two: Tensor,
        positions: Tensor,
        masks: Mapping[str, Tensor],
        length: int,
        uniforms: Tensor,
        params: RowParams,
    ) -> Proposals:
        """The proposals of rows 0 .. B - 1; the runner's gate is open to them already.

        Args:
          k: at least 1.
          n: int64 [B], tokens of each row.
          last_two: int64 [B, 2].
          positions: int64 [B, k + 2], of the last two tokens, the proposals and one more.
          masks, length: as `ModelRunner.forward` takes them, of these positions.
          uniforms: float32 [B, at least k].
        """
        asked = None if self._recall is None else self._recall.asked(n)
        graphs = self._runner.graphs
        if graphs is not None and graphs.ready:
            given = self._runner.given(graphs, positions, masks, length)
            return self._captured(graphs, given, tuple(masks), k, last_two, uniforms[:, :k], params, asked)

        def forward(tokens: Tensor, first: int, last: int) -> Tensor:
            seen = columns(masks, first, last)
            return self._runner.forward(tokens, positions[:, first:last], seen, 0, length, last_only=True)

        return self._draw(k, forward, last_two, uniforms, params, asked)

    def _draw(
        self,
        k: int,
        forward: Callable[[Tensor, int, int], Tensor],
        last_two: Tensor,
        uniforms: Tensor,
        params: RowParams,
        asked: Asked | None,
    ) -> Proposals:
        """`forward`: a pass over tokens that stand at positions first .. last - 1 of the round."""
        fed, drawn, logits_seen, q_seen, own, found = last_two, [], [], [], [], []
        for i in range(k):
            first, last = (0, 2) if i == 0 else (i + 1, i + 2)
            logits = self._like_target(forward(self.known(fed), first, last)[:, 0])
            if self._recall is None or asked is None:
                token, q = choose(logits, params, uniforms[:, i])
            else:
                token, q, mine, sources = self._recall.propose(asked, i, logits, params, uniforms[:, i])
                own.append(mine)
                found.append(sources)
            fed = token[:, None]
            drawn.append(fed)
            logits_seen.append(logits)
            if q is not None:
                q_seen.append(q)
        return Proposals(
            torch.cat(drawn, 1),
            torch.stack(logits_seen, 1),
            torch.stack(q_seen, 1) if q_seen else None,
            torch.stack(own, 1) if own else None,
            Recalled(*(torch.stack([getattr(f, name) for f in found], 1) for name in Recalled.__slots__))
            if found
            else None,
        )

    def _captured(
        self,
        graphs: Graphs,
        given: Given,
        kinds: tuple[str, ...],
        k: int,
        last_two: Tensor,
        uniforms: Tensor,
        params: RowParams,
        asked: Asked | None,
    ) -> Proposals:
        rows = len(last_two)
        size = graphs.rows(rows)
        fill, full = (0, 0, 0, size - rows), params.filled(size)
        row_tensors, recall = full.tensors(), [] if asked is None else asked.filled(size)

        def run(given: Given, more: Sequence[Tensor]) -> Sequence[Tensor]:
            def forward(tokens: Tensor, first: int, last: int) -> Tensor:
                return graphs.forward(tokens, given.queries(first, last), kinds, last_only=True)

            inside = full.replaced(more[2 : 2 + len(row_tensors)])
            to_recall = Asked(*more[2 + len(row_tensors) :]) if recall else None
            return self._draw(k, forward, more[0], more[1], inside, to_recall).tensors()

        found = graphs.replay(
            (k, kinds, params.any_greedy, params.any_sampled),
            given,
            [pad(last_two, fill), pad(uniforms, fill), *row_tensors, *recall],
            run,
        )
        found = tuple(tensor[:rows] for tensor in found)
        if asked is None:
            return Proposals(found[0], found[1], found[2] if params.any_sampled else None, None, None)
        return Proposals(found[0], found[1], found[2], found[3], Recalled(*found[4:]))

    def known(self, tokens: Tensor) -> Tensor:
        """Tokens the draft has an embedding for; a padding entry that only the target has becomes the draft's last."""
        if self._runner.vocab_size >= self._vocab:
            return tokens
        return tokens.clamp(max=self._runner.vocab_size - 1)

    def _like_target(self, logits: Tensor) -> Tensor:
        """Draft logits [B, V_draft] in the target's width: padding entries cut, or added at probability zero."""
        missing = self._vocab - logits.shape[-1]
        return logits if missing == 0 else pad(logits, (0, missing), value=-torch.inf)
