"""Which tensors of a draft learn, and the draft that has them.

A learner and its decoders build an `AdaptedDraft` from the same base and the same `ScopeConfig`. Their learned tensors
then have the same names, shapes, dtype (float32) and day-0 values, so one checkpoint serves all:

    learner:  draft = AdaptedDraft(model, config)                optimise draft.trainable(); publish draft.state()
    decoder:  draft = AdaptedDraft(model, config, serving=True)  copy into draft.expected(); draft.refresh()

Everything else is frozen. Day 0 is the base's function.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from adaptd.errors import AdaptdError, ConfigError
from adaptd.models.embedding import EmbeddingCorrection
from adaptd.models.full import Full
from adaptd.models.fused_expert import FusedExperts
from adaptd.models.head import MergedHead, TrainedHead
from adaptd.models.layers import attention_layers, ffns, head_name, linear_layers, named_layers
from adaptd.models.load import cast_parameters, freeze, move, weights_id
from adaptd.models.lora import GatedLora, MergedLora, PeftLora
from adaptd.models.part import Part
from adaptd.models.private_expert import TrainedExperts
from adaptd.models.request_gate import Openness, RequestGate, request_gate

SCOPES = ("private_expert", "lora", "full")

#: Set on a model once it is wrapped: wrapping twice would freeze and hash the first wrapping as if it were the base.
_MARK = "_adaptd_scope"


@dataclass(frozen=True, kw_only=True)
class ScopeConfig:
    """What learns. The default, private experts and a head correction behind gates, can leave old traffic as it was."""

    scope: str = "private_expert"
    #: private_expert: width of the private expert; the base's intermediate size is the scale to compare it with.
    width: int = 128
    #: private_expert: learned gates of the private expert and of the head's correction; False holds them at one, which
    #: can be folded into a plain model.
    gated: bool = True
    #: A learned gate by prompt over everything that is learned; None: where `gated` and scope is private_expert.
    request_gate: bool | None = None
    #: Rank of LoRA; 0 leaves it out (private_expert only); None: 16.
    lora_rank: int | None = None
    #: LoRA's delta is (lora_alpha / lora_rank) B A.
    lora_alpha: float = 32.0
    #: Layers by name or end of name (`q_proj`); None: attention for private_expert, every linear layer for lora.
    lora_targets: Sequence[str] | None = None
    #: Rank of the output head's correction; 0 leaves it out; None: 24 for private_expert, 0 for lora.
    head_rank: int | None = None
    #: Rank of the input embedding's correction; 0 leaves it out; None: 24 for private_expert, 0 for lora.
    embed_rank: int | None = None
    #: A learned bias in the output head's correction; such a draft cannot be folded into a plain model.
    head_bias: bool = True
    #: Seed of the random day-0 values.
    seed: int = 0

    def __post_init__(self) -> None:
        if self.scope not in SCOPES:
            nearest = difflib.get_close_matches(self.scope, SCOPES, 1, 0.0)[0]
            raise ConfigError(f"scope ({self.scope!r}) must be one of {', '.join(SCOPES)}; nearest: {nearest}")
        if self.width < 1:
            raise ConfigError(f"width ({self.width}) must be at least 1")
        if self.effective_lora_rank < 0 or (self.lora_rank == 0 and self.scope == "lora"):
            lowest = int(self.scope == "lora")
            raise ConfigError(f"lora_rank ({self.lora_rank}) must be at least {lowest} for scope {self.scope}")
        if self.lora_alpha <= 0:
            raise ConfigError(f"lora_alpha ({self.lora_alpha}) must be above 0")
        for name, rank in (("head_rank", self.head_rank), ("embed_rank", self.embed_rank)):
            if rank is not None and rank < 0:
                raise ConfigError(f"{name} ({rank}) must be at least 0")
        if self.lora_targets is not None:
            if isinstance(self.lora_targets, str) or not self.lora_targets:
                raise ConfigError(f"lora_targets ({self.lora_targets!r}) must be a list of layer names, or null")
            # A list from JSON or YAML becomes the tuple that a frozen value needs.
            object.__setattr__(self, "lora_targets", tuple(self.lora_targets))

    @property
    def effective_head_rank(self) -> int:
        """`head_rank` with the scope's default filled in."""
        if self.head_rank is None:
            return 24 if self.scope == "private_expert" else 0
        return self.head_rank

    @property
    def effective_embed_rank(self) -> int:
        """`embed_rank` with the scope's default filled in."""
        if self.embed_rank is None:
            return 24 if self.scope == "private_expert" else 0
        return self.embed_rank

    @property
    def effective_lora_rank(self) -> int:
        """`lora_rank` with the scope's default filled in."""
        if self.lora_rank is None:
            return 16
        return self.lora_rank

    @property
    def effective_request_gate(self) -> bool:
        """`request_gate` with the scope's default filled in."""
        return self.gated_head if self.request_gate is None else self.request_gate

    @property
    def gated_head(self) -> bool:
        """Whether the head's correction has a gate: beside a gated private expert."""
        return self.gated and self.scope == "private_expert"

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable; `ScopeConfig(**d)` gives it back."""
        values = asdict(self)
        if self.lora_targets is not None:
            values["lora_targets"] = list(self.lora_targets)
        return values


class AdaptedDraft:
    """A base draft wrapped in place with learned parts.

    `model` is the Hugging Face causal LM itself, same forward. Build it on its final device and in its final precision:
    the serving form keeps views into its own storage, which `Module.to` would break.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: ScopeConfig | None = None,
        *,
        serving: bool = False,
        base_id: str | None = None,
    ) -> None:
        """Wrap `model` in place; it is put in eval mode.

        Args:
          model: the pristine base draft.
          config: what learns.
          serving: merge what can be merged; nothing requires gradients and `refresh` must follow every change.
          base_id: identity of the base's weights, from `load_draft`; None hashes the tensors as they are now, which
            differs between precisions.

        Raises:
          ConfigError: the architecture has no place for what is asked; the message names what it has.
          ValueError: `model` is wrapped already.
        """
        if hasattr(model, _MARK):
            raise ValueError(f"model is already adapted with scope {getattr(model, _MARK)}: load the base again")
        config = ScopeConfig() if config is None else config
        freeze(model)
        self.model = model
        self.serving = serving
        self.scope = config.scope
        self.scope_config = config.to_dict()
        self.base_id = weights_id(model) if base_id is None else base_id
        self._config = config
        self._total = sum(p.numel() for p in model.parameters())
        self._base: dict[str, Tensor] = dict(model.state_dict(keep_vars=True))
        self._parts = self._build()
        setattr(model, _MARK, config.scope)
        freeze(model)
        self.reset()
        for parameter in self.trainable().values():
            parameter.requires_grad_(not serving)
        self.prove_frozen()

    def _build(self) -> list[Part]:
        model, config = self.model, self._config
        if config.scope == "full":
            return [Full(model, self._base, serving=self.serving)]
        # All places are looked up before any is changed: afterwards names and classes are others.
        lora_rank = config.effective_lora_rank
        layers = self._lora_layers() if lora_rank else {}
        feed_forwards = ffns(model) if config.scope == "private_expert" else []
        rank, head = config.effective_head_rank, head_name(model) if config.effective_head_rank else ""
        openness = Openness()
        # The same in both forms: there is nothing to merge.
        parts: list[Part] = [RequestGate(model, openness)] if config.effective_request_gate else []
        embed_rank = config.effective_embed_rank
        embedding = [EmbeddingCorrection(model, embed_rank, openness)] if embed_rank else []
        if self.serving:
            gate = config.effective_request_gate
            inside = any(layer.startswith(f"{ffn.name}.") for layer in layers for ffn in feed_forwards)
            if layers and gate:
                parts.append(GatedLora(model, layers, lora_rank, config.lora_alpha, openness))
            if feed_forwards:
                # LoRA that stays beside the layers of an FFN cannot act inside one wide matrix.
                kind = TrainedExperts if gate and inside else FusedExperts
                parts.append(kind(model, feed_forwards, config.width, config.gated, openness))
            if layers and not gate:
                parts.append(MergedLora(layers, lora_rank, config.lora_alpha, self._base))
            if head and config.gated_head:
                parts.append(TrainedHead(model, head, rank, config.head_bias, True, openness, serving=True))
            elif head:
                parts.append(MergedHead(model, head, rank, config.head_bias))
            return [*parts, *embedding]
        if layers:
            parts.append(PeftLora(model, layers, lora_rank, config.lora_alpha, openness))
        if feed_forwards:
            parts.append(TrainedExperts(model, feed_forwards, config.width, config.gated, openness))
        if head:
            parts.append(TrainedHead(model, head, rank, config.head_bias, config.gated_head, openness))
        return [*parts, *embedding]

    def _lora_layers(self) -> dict[str, nn.Module]:
        if self._config.lora_targets is not None:
            return named_layers(self.model, self._config.lora_targets)
        if self._config.scope == "private_expert":
            return attention_layers(self.model)
        return linear_layers(self.model)

    def trainable(self) -> dict[str, nn.Parameter]:
        """The learned tensors by checkpoint name, sorted; in the training form the only ones that require gradients."""
        merged = {name: p for part in self._parts for name, p in part.parameters.items()}
        return dict(sorted(merged.items()))

    def matrices(self) -> set[str]:
        """Names of the learned tensors that map one hidden space to another at full rank."""
        return {name for part in self._parts for name in part.matrices}

    def expected(self) -> dict[str, Tensor]:
        """The live storage of the learned tensors: check a checkpoint against it, copy into it, then `refresh`."""
        return {name: parameter.detach() for name, parameter in self.trainable().items()}

    def state(self) -> dict[str, Tensor]:
        """Copies of the learned tensors: what a checkpoint holds."""
        return {name: tensor.clone() for name, tensor in self.expected().items()}

    def base_state(self) -> dict[str, Tensor]:
        """The pristine base's tensors under its own names (not copies): never changed by learning or by `refresh`."""
        return {name: tensor.detach() for name, tensor in self._base.items()}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy a checkpoint's tensors in place and refresh; no tensors at all mean day 0.

        Raises:
          ValueError: names or shapes differ; nothing has been written then.
        """
        if not tensors:
            self.reset()
            return
        expected = self.expected()
        wrong = sorted(expected.keys() ^ tensors.keys())
        wrong += [name for name in expected.keys() & tensors.keys() if expected[name].shape != tensors[name].shape]
        if wrong:
            raise ValueError(f"{len(wrong)} tensors do not fit scope {self.scope}, first {wrong[0]!r}")
        for name, tensor in tensors.items():
            expected[name].copy_(tensor)
        self.refresh()

    @property
    def gates_requests(self) -> bool:
        """Whether one request can have the base while another has what was learned."""
        return request_gate(self.model) is not None

    def keep_on_base(self, domains: Iterable[str]) -> None:
        """Serve requests of these domains, and no others, with the base draft; without a request gate nothing happens."""
        gate = request_gate(self.model)
        if gate is not None:
            gate.on_base = frozenset(domains)

    def reset(self) -> None:
        """Day-0 values: exactly the base's function, the same values in every process."""
        for part in self._parts:
            part.reset(self._config.seed)
        self.refresh()

    def refresh(self) -> None:
        """Make a serving draft follow its learned tensors, in place: after every copy. No effect in training."""
        for part in self._parts:
            part.refresh()

    def prove_frozen(self) -> None:
        """Return if exactly `trainable()` requires gradients (nothing at all in the serving form).

        Raises:
          AdaptdError: a frozen tensor would learn, or a learned one would not; the message names the first.
        """
        allowed = {} if self.serving else {id(p): name for name, p in self.trainable().items()}
        learning = {id(p): name for name, p in self.model.named_parameters() if p.requires_grad}
        if extra := sorted(learning[key] for key in learning.keys() - allowed.keys()):
            raise AdaptdError(f"{len(extra)} frozen tensors require gradients, first {extra[0]!r}")
        if missing := sorted(allowed[key] for key in allowed.keys() - learning.keys()):
            raise AdaptdError(f"{len(missing)} learned tensors do not require gradients, first {missing[0]!r}")

    @property
    def trainable_fraction(self) -> float:
        """Learned parameters over the base's parameters (tied ones counted once)."""
        return sum(p.numel() for p in self.trainable().values()) / self._total

    def fold(self) -> PreTrainedModel:
        """A plain model of the same class that computes what this draft computes now, for any engine to load.

        LoRA is merged, the FFNs are wider by the private expert, the head is untied if it was corrected. Of a day-0
        draft it gives the base widened by a zero expert. Memory: a second model.

        Raises:
          ConfigError: the draft is gated, or its head has a learned bias.
        """
        state = self.base_state()
        config = copy.deepcopy(self.model.config)
        dtype = next(iter(state.values())).dtype
        with torch.no_grad():
            for part in sorted(self._parts, key=lambda p: isinstance(p, TrainedExperts | FusedExperts)):
                part.fold_into(state, config)
        folded: PreTrainedModel = type(self.model)(config)
        cast_parameters(folded, dtype)
        folded.load_state_dict(state)
        move(folded, self.model.device)
        freeze(folded)
        return folded
