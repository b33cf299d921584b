"""A low-rank correction of the input embedding: E'(v) = E(v) + up[v] down.

Hidden size H, rank r, vocabulary size N. `up` [N, r] starts at zero, `down` [r, H] random. A draft that was distilled on
other traffic has hardly learned what this traffic's tokens mean; nothing behind the embedding can tell apart what it
makes alike. Where the head is tied to the embedding it keeps the base's weight.

Tensors: `<embedding>.low_rank.up.weight`, `<embedding>.low_rank.down.weight`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from adaptd.errors import ConfigError
from adaptd.models.layers import embedding_name
from adaptd.models.part import Part, learned
from adaptd.models.request_gate import Openness


class EmbeddingCorrection(Part):
    """The correction beside the embedding, in training and in serving alike: it costs r H multiplications a token."""

    def __init__(self, model: PreTrainedModel, rank: int, openness: Openness) -> None:
        """Raises: ConfigError: the input embedding is no plain table."""
        super().__init__()
        name = embedding_name(model)
        base = model.get_submodule(name)
        if not isinstance(base, nn.Embedding):
            raise ConfigError(
                f"the input embedding {name} ({type(base).__name__}) is no plain table: set embed_rank to 0"
            )
        self._name = name
        device, (rows, hidden) = base.weight.device, base.weight.shape
        self.up = self.add(f"{name}.low_rank.up.weight", learned(rows, rank, device=device))
        self.down = self.add(f"{name}.low_rank.down.weight", learned(rank, hidden, device=device), random=True)
        model.set_submodule(name, LowRankEmbedding(base, self.up, self.down, openness))

    def refresh(self) -> None:
        """Nothing to do: the correction acts in the forward pass."""

    def fold_into(self, state: dict[str, Tensor], config: Any) -> None:
        """Write the corrected table; a head that was tied to it keeps the base's weight."""
        weight = state[f"{self._name}.weight"]
        state[f"{self._name}.weight"] = (weight.float() + self.up @ self.down).to(weight.dtype)
        config.tie_word_embeddings = False


class LowRankEmbedding(nn.Module):
    """Token ids [...] to hidden states [..., H]."""

    def __init__(self, base: nn.Embedding, up: nn.Parameter, down: nn.Parameter, openness: Openness) -> None:
        super().__init__()
        self.base, self.up, self.down = base, up, down
        self._openness = openness

    @property
    def weight(self) -> Tensor:
        """The base table, where Hugging Face code expects it."""
        return self.base.weight

    def forward(self, ids: Tensor) -> Tensor:
        """E'(v) of the module's docstring."""
        hidden: Tensor = self.base(ids)
        low = self._openness.scale(functional.embedding(ids, self.up))
        return hidden + (low @ self.down).to(hidden.dtype)
