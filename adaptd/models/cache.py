"""Key-value cache for rows of different lengths: every row writes at its own position, rolling back moves nothing.

A layer is one static tensor [slots, heads, capacity, head_dim] for keys and one for values. Before a forward pass the
caller points the cache at the rows and positions the pass will write (`RaggedCache.point`); attention then sees the
first `length` positions of those rows. What lies behind a row's own length is stale and harmless: the caller's mask
(`additive_mask`) hides it and the next pass overwrites it. So a rejected token costs nothing, and there is no crop.

The masks are four-dimensional, [B, 1, Q, L], which transformers passes on unchanged. They are additive because the
`eager` attention adds them; `sdpa` takes both kinds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, Cache
from transformers.cache_utils import CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

FULL = "full_attention"
SLIDING = "sliding_attention"
GROUPED_SDPA = "adaptd_grouped_sdpa"
#: Cache positions seen by a pass are rounded up to a multiple of this, so that shapes repeat.
LENGTH_STEP = 32
#: Attention kernels that take an explicit additive mask.
MASKED_KERNELS = ("eager", "sdpa", GROUPED_SDPA)


class RaggedLayer(CacheLayerMixin):
    """Keys and values of one attention layer, allocated at the first write when their shapes are known."""

    is_sliding = False

    def __init__(self, owner: RaggedCache) -> None:
        super().__init__()
        self.owner = owner

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocates zeros (never uninitialised memory: a NaN behind the mask would still reach the output)."""
        slots, capacity = self.owner.slots, self.owner.capacity
        for name, states in (("keys", key_states), ("values", value_states)):
            shape = (slots, states.shape[1], capacity, states.shape[3])
            setattr(self, name, torch.zeros(shape, dtype=states.dtype, device=states.device))
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes [B, heads, Q, head_dim] where the owner points; returns the rows' first `length` positions."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        owner = self.owner
        index = owner.index_for(key_states.shape[1])
        first, last, length = owner.first, owner.last, owner.length
        seen = []
        for store, states in ((self.keys, key_states), (self.values, value_states)):
            tensor = cast(Tensor, store)
            tensor.view(-1, tensor.shape[3]).index_copy_(0, index, states.reshape(-1, tensor.shape[3]))
            seen.append(tensor[first:last, :, :length])
        return seen[0], seen[1]

    def move(self, sources: Tensor, destinations: Tensor, length: int) -> None:
        """Copies the first `length` positions of rows `sources` over rows `destinations`."""
        if self.is_initialized:
            for store in (cast(Tensor, self.keys), cast(Tensor, self.values)):
                prefixes = store[:, :, :length]
                prefixes.index_copy_(0, destinations, prefixes.index_select(0, sources))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Key length and offset, for models that ask although the mask is given."""
        return self.owner.length, 0

    def get_seq_length(self) -> int:
        """Positions visible to the current pass."""
        return self.owner.length

    def get_max_length(self) -> int:
        """Positions a row can hold."""
        return self.owner.capacity


class RaggedCache(Cache):
    """Cache of `slots` rows and `capacity` positions each, with write positions of its own for every row.

    Args:
      num_layers: attention layers of the model.
      slots: rows.
      capacity: positions a row; writing at or behind it is the caller's error.
      device: where positions live.
    """

    def __init__(self, num_layers: int, slots: int, capacity: int, device: torch.device | str) -> None:
        self.slots, self.capacity = slots, capacity
        self.first = self.last = self.length = 0
        self._device = torch.device(device)
        self._positions = torch.zeros(0, 0, dtype=torch.long, device=self._device)
        self._index: dict[int, Tensor] = {}
        self._row_base: dict[int, Tensor] = {}
        super().__init__(layers=[RaggedLayer(self) for _ in range(num_layers)])

    def point(self, first: int, positions: Tensor, length: int) -> None:
        """Aims the next pass at rows [first, first + B), writing row b at `positions[b]`, seeing `length` positions.

        Args:
          first: first row.
          positions: int64 [B, Q]. A position may repeat within a row only if it carries the same token.
          length: positions attention sees; must exceed every written position.
        """
        self.first, self.last, self.length = first, first + positions.shape[0], length
        self._positions = positions
        self._index = {}

    def aim(self, rows: int, length: int, index: dict[int, Tensor]) -> None:
        """As `point`, for rows [0, rows) that write where `index` says, by the number of key-value heads."""
        self.first, self.last, self.length = 0, rows, length
        self._index = index

    def index_for(self, heads: int) -> Tensor:
        """Rows of the flattened store that the current pass writes, int64 [B * heads * Q]; shared by all layers."""
        index = self._index.get(heads)
        if index is None:
            index = self._index[heads] = self.index_of(slice(self.first, self.last), self._positions, heads)
        return index

    def index_of(self, slots: slice | Tensor, positions: Tensor, heads: int) -> Tensor:
        """Rows of the flattened store at `positions` [B, Q] of those slots, int64 [B * heads * Q]."""
        base = self._row_base.get(heads)
        if base is None:
            rows = torch.arange(self.slots * heads, device=self._device) * self.capacity
            base = self._row_base[heads] = rows.view(self.slots, heads, 1)
        return (base[slots] + positions[:, None, :]).reshape(-1)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """See `RaggedLayer.update`."""
        return cast(RaggedLayer, self.layers[layer_idx]).update(key_states, value_states)

    def move(self, sources: Sequence[int], destinations: Sequence[int], length: int) -> None:
        """Copies the first `length` positions of rows `sources` over rows `destinations`, in every layer.

        All are read before any is written, so the two lists may overlap.
        """
        read, written = (torch.tensor(rows, device=self._device) for rows in (sources, destinations))
        for layer in self.layers:
            cast(RaggedLayer, layer).move(read, written, length)

    @property
    def nbytes(self) -> int:
        """Bytes held by keys and values; 0 before the first pass."""
        layers = (cast(RaggedLayer, layer) for layer in self.layers)
        stores = (store for layer in layers for store in (layer.keys, layer.values) if store is not None)
        return sum(store.numel() * store.element_size() for store in stores)


def round_up(length: int) -> int:
    """Cache positions that a pass over `length` of them sees."""
    return -(-length // LENGTH_STEP) * LENGTH_STEP


def additive_mask(positions: Tensor, length: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """Causal mask of queries at their own positions over the first `length` cache positions.

    Args:
      positions: int64 [B, Q], position of each query.
      length: cache positions seen, L.
      window: a query sees only the last `window` positions, its own included; None for all.
      dtype: of the model's activations.
    Returns: [B, 1, Q, L]: 0 where a query may look, the most negative number of `dtype` elsewhere.
    """
    keys = torch.arange(length, device=positions.device)
    queries = positions[:, :, None]
    hidden = keys > queries
    if window is not None:
        hidden |= keys <= queries - window
    return additive(hidden, dtype)


def additive(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """What attention adds to its scores, [B, 1, Q, L], for what is hidden, bool [B, Q, L]."""
    mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
    return mask.masked_fill_(hidden, torch.finfo(dtype).min)[:, None]


def attention_windows(config: Any, max_length: int) -> dict[str, int | None]:
    """Which masks a model needs: attention kind -> window in tokens (None: sees everything).

    Args:
      config: the model's configuration (its text part is used).
      max_length: longest sequence that will be decoded; a window at least that long hides nothing.
    Returns: one entry for a model that takes one mask, several for one that takes a mask per kind of layer.
    Raises: ValueError: a layer keeps a recurrent or compressed state, which cannot be rolled back by position.
    """
    config = config.get_text_config(decoder=True)
    window = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", True) is False or (window is not None and window >= max_length):
        window = None
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        return {SLIDING: window} if window is not None else {FULL: None}
    kinds = sorted(set(layer_types))
    unsupported = [kind for kind in kinds if kind not in (FULL, SLIDING)]
    if unsupported:
        raise ValueError(
            f"layer_types has {', '.join(unsupported)}: only {FULL} and {SLIDING} layers can be rolled back by "
            "position; choose a model with plain attention layers"
        )
    return {kind: window if kind == SLIDING else None for kind in kinds}


def grouped_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention with grouped query heads that never repeats keys and values.

    The heads that share a key-value head become more queries of that head: [B, H, Q, D] is read as [B, H/G, G*Q, D].
    transformers' `sdpa` copies the whole cache G-fold at every layer of every pass when a mask is given; for short
    queries over a long cache that copy costs several times the attention itself.

    Returns: [B, Q, H, D] and None, as transformers expects; calls without grouping or mask go to its own `sdpa`.
    """
    batch, heads, length, _ = query.shape
    shared = key.shape[1]
    groups = heads // shared
    if groups == 1 or attention_mask is None or attention_mask.shape[1] != 1 or kwargs.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    seen = attention_mask.shape[3]
    mask = attention_mask[:, :, None].expand(-1, -1, groups, -1, -1).reshape(-1, 1, groups * length, seen)
    folded = query.reshape(batch, shared, groups * length, query.shape[3])
    out = scaled_dot_product_attention(folded, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling)
    return out.reshape(batch, heads, length, value.shape[3]).transpose(1, 2).contiguous(), None


AttentionInterface.register(GROUPED_SDPA, grouped_sdpa)
AttentionMaskInterface.register(GROUPED_SDPA, sdpa_mask)


def prepare_attention(model: nn.Module) -> None:
    """Makes attention fit for explicit masks: `sdpa` with grouped heads becomes `grouped_sdpa`, the same sums.

    Raises: ValueError: the model runs a kernel that takes no custom mask (flash attention).
    """
    config = cast(Any, model).config.get_text_config(decoder=True)
    kernel = config._attn_implementation
    if kernel not in MASKED_KERNELS:
        raise ValueError(
            f"attention implementation {kernel!r} takes no explicit mask; load the model with "
            'attn_implementation="sdpa" or "eager"'
        )
    heads = getattr(config, "num_attention_heads", 1)
    if kernel == "sdpa" and (getattr(config, "num_key_value_heads", None) or heads) != heads:
        config._attn_implementation = GROUPED_SDPA
