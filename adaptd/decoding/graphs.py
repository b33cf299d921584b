"""Forward passes captured once a shape and replayed: on a GPU a small pass costs what its launches cost, not its sums.

A captured pass reads and writes at fixed addresses, so everything that differs from round to round is an input with a place of
its own: tokens, positions, masks, where the cache is written, the request gate's openness. Weights are read where they
are; a hot swap copies into them, and every captured pass sees it. Shapes are few: rows are filled up to a power of two with
rows that write into a slot of their own, which no request has; cache positions seen, to a power of two times `LENGTH_STEP`.

`capture` is `cuda_graph` on a GPU. Any other that keeps to its meaning will do: the tests trace the operations on a CPU
and run the trace, in which, as in a graph, whatever was not an input is a constant.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from adaptd.models.cache import LENGTH_STEP, RaggedCache, RaggedLayer
from adaptd.models.lean import LeanDecoder
from adaptd.models.request_gate import conditioned

Pass = Callable[..., Tensor]
Capture = Callable[[Pass, Sequence[Tensor]], Callable[[], Tensor]]
"""(function, its inputs at their places) -> what runs it on whatever is at those places then."""


def cuda_graph(run: Pass, inputs: Sequence[Tensor]) -> Callable[[], Tensor]:
    """Captures on the current device; the first two runs, on a stream of their own, let libraries allocate."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run(*inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run(*inputs)

    def replay() -> Tensor:
        graph.replay()
        # The next replay writes there again, and proposals are compared with the logits they came from.
        return output.clone()

    return replay


class GraphedPasses:
    """The passes of one model.

    Args:
      model: what `lean` runs, for its request gate.
      cache: has one slot more than there may be rows: the last, which filled-up rows write.
      heads: key-value heads.
      capture: see the module.
    """

    def __init__(self, model: nn.Module, lean: LeanDecoder, cache: RaggedCache, heads: int, capture: Capture) -> None:
        self._model, self._lean, self._cache, self._heads, self._capture = model, lean, cache, heads, capture
        self._captured: dict[tuple[object, ...], tuple[list[Tensor], Callable[[], Tensor]]] = {}

    def __len__(self) -> int:
        return len(self._captured)

    @property
    def ready(self) -> bool:
        """Whether the cache is there: what is allocated while a pass is captured would be that pass's own."""
        return cast(RaggedLayer, self._cache.layers[-1]).is_initialized

    def __call__(
        self,
        tokens: Tensor,
        positions: Tensor,
        writes: Tensor,
        masks: Mapping[str, Tensor],
        length: int,
        openness: Tensor | None,
        *,
        last_only: bool,
    ) -> Tensor:
        """As `ModelRunner.forward` for rows 0 .. B - 1; `writes` [B, Q] are the cache positions that are written."""
        rows, width = tokens.shape
        spare = self._cache.slots - 1
        size = min(1 << (rows - 1).bit_length(), spare)
        fill = size - rows
        seen = min(self._cache.capacity, LENGTH_STEP << ((length - 1) // LENGTH_STEP).bit_length())
        slots = torch.arange(size, device=tokens.device)
        slots[rows:] = spare
        index = self._cache.index_of(slots, pad(writes, (0, 0, 0, fill)), self._heads)
        given = [pad(tokens, (0, 0, 0, fill)), pad(positions, (0, 0, 0, fill)), index]
        if openness is not None:
            given.append(pad(openness, (0, 0, 0, 0, 0, fill)))
        for mask in masks.values():
            hidden = torch.finfo(mask.dtype).min
            # A filled-up row sees whatever stands in its slot, which nobody reads.
            given.append(pad(pad(mask, (0, seen - length), value=hidden), (0, 0, 0, 0, 0, 0, 0, fill)))
        key = (size, width, seen, last_only, openness is None, tuple(masks))
        known = self._captured.get(key)
        if known is None:
            places = [tensor.clone() for tensor in given]
            run = self._pass(size, seen, tuple(masks), openness is not None, last_only)
            known = self._captured[key] = places, self._capture(run, places)
        places, replay = known
        torch._foreach_copy_(places, given)
        return replay()[:rows]

    def _pass(self, rows: int, length: int, kinds: tuple[str, ...], gated: bool, last_only: bool) -> Pass:
        def run(tokens: Tensor, positions: Tensor, index: Tensor, *rest: Tensor) -> Tensor:
            openness = rest[0] if gated else None
            masks = dict(zip(kinds, rest[gated:], strict=True))
            self._cache.aim(rows, length, {self._heads: index})
            with conditioned(self._model, openness):
                return self._lean(tokens, positions, masks, self._cache, last_only=last_only).float()

        return run
