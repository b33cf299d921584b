"""The request gate: how much of everything learned a request gets, from its prompt.

    s = 2 sigmoid(w . norm(phi - c) + b),        phi = norm(mean over the prompt's tokens of E(v))

Hidden size H; E is the frozen input embedding of the base draft, norm scales to unit mean square. s multiplies what every
learned part adds: private experts, LoRA, output head, input embedding. w [1, H] and b [1] start at zero, so the gate starts
at one and, like the gates by token, can shut completely: a request whose prompt looks like traffic that the base draft knew
gets the base back. A single position says little of where its text comes from (all domains share their function words); a
prompt says enough, and it is known before the first proposal. No label of the request is needed.

c [H] is the mean of phi over the first traffic that was learned from, and stays: what all prompts have in common (template,
function words) is most of phi (cosine 0.95 between domains) and would drown what tells them apart.

Tensors: `request_gate.weight` [1, H], `request_gate.bias` [1], `request_gate.centre` [H] (set once, never by a gradient).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from adaptd.errors import ConfigError
from adaptd.models.part import Part, learned

_ATTRIBUTE = "_adaptd_request_gate"


class Openness:
    """How far the gate is open for the rows of the forward passes that follow; shared by all learned modules of a draft."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: Tensor | None = None
        """[B, 1, 1], or None: one everywhere."""

    def scale(self, addition: Tensor) -> Tensor:
        """What a learned part adds, [B, T, ...], times the openness of its row."""
        return addition if self.value is None else addition * self.value


class PromptGate(nn.Module):
    """The gate in a model, which carries it as a child (`request_gate`)."""

    def __init__(self, embedding: nn.Embedding, openness: Openness) -> None:
        super().__init__()
        # In a tuple it is no child of this module; of the weight nothing is kept, which may move into a wider matrix.
        self._embedding = (embedding,)
        table = self._table
        self.openness = openness
        self.on_base: frozenset[str] = frozenset()
        """Domains whose requests are kept on the base draft: for them the gate is shut, whatever their prompts."""
        self.weight = learned(1, table.shape[1], device=table.device)
        self.bias = learned(1, device=table.device)
        self.centre = learned(table.shape[1], device=table.device)

    @property
    def _table(self) -> Tensor:
        return self._embedding[0].weight.detach()

    @property
    def centred(self) -> bool:
        """Whether `centre_on` was called; of day 0 it was not."""
        return bool(self.centre.any())

    @torch.no_grad()
    def centre_on(self, prompts: Iterable[Any]) -> None:
        """Let features be told from the mean of these prompts'."""
        self.centre.copy_(self.features(prompts).mean(0))

    def features(self, prompts: Iterable[Any]) -> Tensor:
        """phi of each prompt (token ids: list, array or tensor), float32 [B, H]."""
        found = []
        for prompt in prompts:
            ids = torch.as_tensor(prompt, device=self._table.device, dtype=torch.int64)
            found.append(self._table[ids.clamp(max=len(self._table) - 1)].float().mean(0))
        return functional.rms_norm(torch.stack(found), (self._table.shape[1],))

    def kept(self, domains: Sequence[str]) -> Tensor:
        """Which rows of these domains stay on the base draft, bool [B, 1]."""
        return torch.tensor([[domain in self.on_base] for domain in domains], device=self._table.device)

    def forward(self, features: Tensor, kept: Tensor | None = None) -> Tensor:
        """s of each row, [B, 1, 1]; `kept` [B, 1]: rows for which the gate is shut, whatever their prompts."""
        features = functional.rms_norm(features - self.centre.detach(), self.centre.shape)
        logit: Tensor = functional.linear(features, self.weight, self.bias)
        opened = 2.0 * torch.sigmoid(logit)
        if kept is not None:
            opened = opened.masked_fill(kept, 0.0)
        return opened[..., None]


class RequestGate(Part):
    """The gate's tensors."""

    def __init__(self, model: PreTrainedModel, openness: Openness) -> None:
        """Raises: ConfigError: the input embedding is no plain table."""
        super().__init__()
        table = model.get_input_embeddings()
        if not isinstance(table, nn.Embedding):
            raise ConfigError(
                f"the input embedding ({type(table).__name__}) is no plain table: set request_gate to false"
            )
        gate = PromptGate(table, openness)
        self.add("request_gate.weight", gate.weight)
        self.add("request_gate.bias", gate.bias)
        self.add("request_gate.centre", gate.centre)
        setattr(model, _ATTRIBUTE, gate)

    def refresh(self) -> None:
        """Nothing to do: the gate is read when a request joins."""

    def fold_into(self, state: dict[str, Tensor], config: Any) -> None:
        """Raises: ConfigError: always; a plain model does not know its prompt."""
        raise ConfigError(
            "a draft with a request gate cannot be folded: adapt with gated: false, or with request_gate: false"
        )


def request_gate(model: nn.Module) -> PromptGate | None:
    """The gate of an adapted draft; None if it has none."""
    gate: PromptGate | None = getattr(model, _ATTRIBUTE, None)
    return gate


@contextmanager
def conditioned(model: nn.Module, value: Tensor | None) -> Iterator[Openness]:
    """Forward passes inside are of rows with this openness [B, 1, 1]; None, or a draft without a gate: one everywhere."""
    gate = request_gate(model)
    openness = Openness() if gate is None else gate.openness
    openness.value = value
    try:
        yield openness
    finally:
        openness.value = None
