"""One model with its ragged cache: a forward pass at given rows and positions."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from adaptd.decoding.graphs import Capture, Given, Graphs
from adaptd.decoding.row import Row
from adaptd.models.cache import RaggedCache, additive_mask, attention_windows, prepare_attention
from adaptd.models.lean import LeanDecoder, can_run
from adaptd.models.request_gate import conditioned, request_gate


class ModelRunner:
    """Runs a causal language model over a `RaggedCache`.

    Args:
      model: Hugging Face causal LM, in eval mode, whose weights may change in place between two calls.
      slots: rows of the cache.
      capacity: positions a row.
      max_length: longest sequence decoded.
      capture: how what a round does is captured; None: it is run anew each time (as where the model is not `lean`).
      compiled: as of `LeanDecoder`, where nothing is captured.
    Raises: ValueError: the model has fewer positions than `max_length`, or state that cannot be rolled back.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        slots: int,
        capacity: int,
        max_length: int,
        capture: Capture | None = None,
        compiled: bool = True,
    ) -> None:
        config = cast(Any, model).config
        text = config.get_text_config(decoder=True)
        limit = getattr(text, "max_position_embeddings", None)
        if limit is not None and max_length > limit:
            raise ValueError(f"max_length ({max_length}) must be at most {limit}, the positions this model has")
        prepare_attention(model)
        self.model = model
        self.vocab_size = int(text.vocab_size)
        # The embedding decides the activations' precision; an adapter's parameters may be kept in another.
        embedding = cast(Any, model).get_input_embeddings().weight
        self.device: torch.device = embedding.device
        self.dtype: torch.dtype = embedding.dtype
        self.windows = attention_windows(config, max_length)
        self._lean: LeanDecoder | None = None
        if can_run(model):
            self._lean = LeanDecoder(model, max_length, compiled=compiled and capture is None)
        else:
            capture = None
        self.cache = RaggedCache(int(text.num_hidden_layers), slots + (capture is not None), capacity, self.device)
        self.graphs: Graphs | None = None
        if self._lean is not None and capture is not None:
            self.graphs = Graphs(model, self._lean, self.cache, int(text.num_key_value_heads), capture)
        self._last_position = max_length - 1
        self._gate = request_gate(model)
        self._openness: Tensor | None = None
        self._about: tuple[tuple[Row, ...], frozenset[str]] = ((), frozenset())
        self._known: tuple[Tensor, Tensor]
        self._keep_last = {"logits_to_keep": 1} if _takes_logits_to_keep(model) else {}

    def masks(self, positions: Tensor, length: int) -> dict[str, Tensor]:
        """The model's masks for queries at `positions` [B, Q] over `length` cache positions, [B, 1, Q, length] each."""
        return {kind: additive_mask(positions, length, window, self.dtype) for kind, window in self.windows.items()}

    def open_to(self, rows: Sequence[Row]) -> None:
        """Sets the model's request gate, if it has one, for the forward passes of these rows that follow.

        What is known of the rows is put on the device when they change, or when other domains stay on the base draft; the
        gate itself is read each time, since a swap may have changed it.
        """
        gate = self._gate
        if gate is None:
            return
        about = (tuple(rows), gate.on_base)
        if about != self._about:
            features = torch.stack([row.prompt_features(gate.features) for row in rows])
            self._about, self._known = about, (features, gate.kept([row.request.domain for row in rows]))
        self._openness = gate(*self._known)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        masks: Mapping[str, Tensor],
        first: int,
        length: int,
        *,
        last_only: bool,
        of_round: bool = False,
        columns: Tensor | None = None,
    ) -> Tensor:
        """One pass that writes the cache.

        Args:
          tokens: int64 [B, Q], for rows first .. first + B - 1.
          positions: int64 [B, Q], where each token stands.
          masks: as `masks` gives them, for these queries.
          first: first row.
          length: cache positions seen.
          last_only: only the last position's logits are needed.
          of_round: a pass over all active rows whose shape comes again and again, worth capturing.
          columns: int64 [B, Q], cache positions to write in the place of `positions`; not for a pass of a round.
        Returns: logits [B, Q, V], or [B, 1, V] if only the last are needed; float32.
        """
        # Surplus positions behind the context's end are computed and thrown away; no table has them.
        writes = positions if columns is None else columns
        positions = positions.clamp(max=self._last_position)
        if of_round and self.graphs is not None and self.graphs.ready:
            return self._replayed(self.graphs, tokens, writes, masks, length, last_only)
        self.cache.point(first, writes, length)
        with conditioned(self.model, self._openness):
            if self._lean is not None:
                logits = self._lean(tokens, positions, masks, self.cache, last_only=last_only)
            else:
                mask: Any = masks if len(masks) > 1 else next(iter(masks.values()))
                logits = self.model(
                    input_ids=tokens,
                    attention_mask=mask,
                    position_ids=positions,
                    past_key_values=self.cache,
                    use_cache=True,
                    **(self._keep_last if last_only else {}),
                ).logits
        return (logits[:, -1:] if last_only else logits).float()

    def given(self, graphs: Graphs, positions: Tensor, masks: Mapping[str, Tensor], length: int) -> Given:
        """Where rows 0 .. B - 1 stand at `positions` [B, Q], for what is captured; arguments as of `forward`."""
        return graphs.given(positions.clamp(max=self._last_position), positions, masks, length, self._openness)

    def _replayed(
        self,
        graphs: Graphs,
        tokens: Tensor,
        positions: Tensor,
        masks: Mapping[str, Tensor],
        length: int,
        last_only: bool,
    ) -> Tensor:
        rows, kinds = len(tokens), tuple(masks)
        filled = pad(tokens, (0, 0, 0, graphs.rows(rows) - rows))

        def run(given: Given, more: Sequence[Tensor]) -> Sequence[Tensor]:
            return (graphs.forward(more[0], given, kinds, last_only=last_only),)

        return graphs.replay((kinds, last_only), self.given(graphs, positions, masks, length), [filled], run)[0][:rows]


def columns(masks: Mapping[str, Tensor], first: int, last: int) -> dict[str, Tensor]:
    """The masks of queries first .. last - 1."""
    return {kind: mask[:, :, first:last] for kind, mask in masks.items()}


def _takes_logits_to_keep(model: nn.Module) -> bool:
    """Whether the model can skip the output head at all but the last positions (an adapter passes the wish on)."""
    inner = cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(inner.forward).parameters
