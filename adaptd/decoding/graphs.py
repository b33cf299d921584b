"""Forward passes captured once a shape and replayed: on a GPU a small pass costs what its launches cost, not its sums.

What is captured reads and writes at fixed addresses, so everything that differs from round to round is an input with a place
of its own: tokens, positions, masks, where the cache is written, the request gate's openness. Weights are read where they
are; a hot swap copies into them, and whatever was captured sees it. Shapes are few: rows are filled up to a power of two with
rows that write into a slot of their own, which no request has; cache positions seen, to a power of two times `LENGTH_STEP`.

`capture` is `cuda_graph` on a GPU. Any other that keeps to its meaning will do: the tests trace the operations on a CPU
and run the trace, in which, as in a graph, whatever was not an input is a constant.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from adaptd import events
from adaptd.log import logger
from adaptd.models.cache import LENGTH_STEP, RaggedCache, RaggedLayer
from adaptd.models.lean import LeanDecoder
from adaptd.models.request_gate import conditioned

_log = logger(__name__)

Work = Callable[..., tuple[Tensor, ...]]
Capture = Callable[[Work, Sequence[Tensor]], Callable[[], tuple[Tensor, ...]]]
"""(function, its inputs at their places) -> what runs it on whatever is at those places then."""


def cuda_graph(run: Work, inputs: Sequence[Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    """Captures on the current device; the first two runs, on a stream of their own, let libraries allocate."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run(*inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run(*inputs)

    def replay() -> tuple[Tensor, ...]:
        graph.replay()
        # The next replay writes there again, and proposals are compared with the logits they came from.
        return tuple(output.clone() for output in outputs)

    return replay


class Given(NamedTuple):
    """Where rows stand and write, filled up to the shape of something captured: [R, Q] for R rows of Q queries."""

    positions: Tensor
    places: Tensor
    """Of the cache, int64 [R, key-value heads, Q], as `RaggedCache.index_of` flattens it."""
    openness: Tensor | None
    """[R, 1, 1]."""
    masks: tuple[Tensor, ...]
    """[R, 1, Q, L] each, L the cache positions seen."""

    def tensors(self) -> list[Tensor]:
        """Those that are there, in order."""
        return [self.positions, self.places, *([] if self.openness is None else [self.openness]), *self.masks]

    def queries(self, first: int, last: int) -> Given:
        """Of queries first .. last - 1 alone."""
        masks = tuple(mask[:, :, first:last] for mask in self.masks)
        return Given(self.positions[:, first:last], self.places[:, :, first:last], self.openness, masks)


class Graphs:
    """What was captured of one model.

    Args:
      model: what `lean` runs, for its request gate.
      cache: has one slot more than there may be rows: the last, which filled-up rows write.
      heads: key-value heads.
      capture: see the module.
    """

    def __init__(self, model: nn.Module, lean: LeanDecoder, cache: RaggedCache, heads: int, capture: Capture) -> None:
        self._model, self._lean, self._cache, self._heads, self._capture = model, lean, cache, heads, capture
        self._captured: dict[Hashable, tuple[list[Tensor], Callable[[], tuple[Tensor, ...]]]] = {}
        self._failed = False

    def __len__(self) -> int:
        return len(self._captured)

    @property
    def ready(self) -> bool:
        """Whether the cache is there: what is allocated while something is captured would be that alone's.

        Never again after something could not be captured.
        """
        return not self._failed and cast(RaggedLayer, self._cache.layers[-1]).is_initialized

    def rows(self, rows: int) -> int:
        """How many there are once they are filled up."""
        return min(1 << (rows - 1).bit_length(), self._cache.slots - 1)

    def given(
        self,
        positions: Tensor,
        writes: Tensor,
        masks: Mapping[str, Tensor],
        length: int,
        openness: Tensor | None,
    ) -> Given:
        """For rows 0 .. B - 1; positions and `writes` [B, Q], the cache positions that are written; see `ModelRunner`."""
        rows, width = positions.shape
        spare, size = self._cache.slots - 1, self.rows(rows)
        fill = size - rows
        seen = min(self._cache.capacity, LENGTH_STEP << ((length - 1) // LENGTH_STEP).bit_length())
        slots = torch.arange(size, device=positions.device)
        slots[rows:] = spare
        places = self._cache.index_of(slots, pad(writes, (0, 0, 0, fill)), self._heads)
        wide = []
        for mask in masks.values():
            hidden = torch.finfo(mask.dtype).min
            # A filled-up row sees whatever stands in its slot, which nobody reads.
            wide.append(pad(pad(mask, (0, seen - length), value=hidden), (0, 0, 0, 0, 0, 0, 0, fill)))
        return Given(
            pad(positions, (0, 0, 0, fill)),
            places.view(size, self._heads, width),
            None if openness is None else pad(openness, (0, 0, 0, 0, 0, fill)),
            tuple(wide),
        )

    def forward(self, tokens: Tensor, given: Given, kinds: Sequence[str], *, last_only: bool) -> Tensor:
        """A pass of what is captured: logits [R, Q, V] or [R, 1, V], float32. `kinds`: of the masks."""
        length = given.masks[0].shape[-1]
        self._cache.aim(len(tokens), length, {self._heads: given.places.reshape(-1)})
        with conditioned(self._model, given.openness):
            masks = dict(zip(kinds, given.masks, strict=True))
            return self._lean(tokens, given.positions, masks, self._cache, last_only=last_only).float()

    def replay(
        self,
        key: Hashable,
        given: Given,
        more: Sequence[Tensor],
        run: Callable[[Given, Sequence[Tensor]], Sequence[Tensor]],
    ) -> tuple[Tensor, ...]:
        """Runs what was captured under `key` and these shapes; captures `run` if nothing was.

        Args:
          key: whatever else `run` depends on.
          more: inputs that are not in `given`.
        Returns: what `run` returns, copied.
        """
        tensors = [*given.tensors(), *more]
        shapes = (key, given.openness is None, *(tensor.shape for tensor in tensors))
        known = self._captured.get(shapes)
        if known is None:
            places, gated = [tensor.clone() for tensor in tensors], given.openness is not None
            first = 2 + gated

            def placed(*inputs: Tensor) -> tuple[Tensor, ...]:
                inside = Given(
                    inputs[0], inputs[1], inputs[2] if gated else None, inputs[first : first + len(given.masks)]
                )
                return tuple(run(inside, inputs[first + len(given.masks) :]))

            try:
                known = self._captured[shapes] = places, self._capture(placed, places)
            except RuntimeError as error:
                self._failed = True
                _log.warning(events.GRAPHS_FAILED, error=str(error), remedy="decoding goes on without CUDA graphs")
                return placed(*tensors)
        places, replay = known
        torch._foreach_copy_(places, tensors)
        return replay()
