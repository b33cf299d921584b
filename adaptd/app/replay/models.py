"""The models of a replay: target if there is one, the draft that is evaluated, the draft that learns."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from adaptd.actors.parts import load_draft, load_pair, placement
from adaptd.config import Config
from adaptd.decoding.build import build_engine, eos_ids
from adaptd.errors import ConfigError
from adaptd.ingest.regenerate import Regenerator
from adaptd.ingest.render import Renderer
from adaptd.ingest.teach import Provenance
from adaptd.ingest.teacher import Wanted
from adaptd.learning.cycle import Identity
from adaptd.models import load
from adaptd.models.scope import AdaptedDraft

#: Bytes of logits [N, V] float32 that evaluation may hold, and the tokens of a trace that this is reckoned with.
_LOGITS_BYTES, _TYPICAL = 1 << 28, 256
_MOST = 32


@dataclass(frozen=True, slots=True)
class ReplayModels:
    """Everything that is loaded."""

    target: PreTrainedModel | None
    why_no_target: str
    draft: AdaptedDraft
    learning: AdaptedDraft
    tokenizer: PreTrainedTokenizerBase
    identity: Identity
    target_id: str
    max_length: int

    @property
    def vocab(self) -> int:
        """Width of the draft's logits."""
        return load.vocab_size(self.draft.model)

    @property
    def chunk(self) -> int:
        """Traces that are evaluated together."""
        return max(1, min(_MOST, _LOGITS_BYTES // (4 * self.vocab * _TYPICAL)))

    @property
    def ends(self) -> set[int]:
        """Tokens that end an answer."""
        return eos_ids(self.target if self.target is not None else self.draft.model, self.tokenizer)

    def renderer(self) -> Renderer:
        """Records to tokens."""
        return Renderer(self.tokenizer, ends=self.ends, vocab=self.vocab, max_length=self.max_length)

    def provenance(self, config: Config, temperature: float) -> Provenance:
        """What all traces have in common."""
        return Provenance(
            target_id=self.target_id,
            k_top=config.capture.k_top,
            vocab=self.vocab,
            max_tokens=config.capture.max_tokens,
            reserved_share=config.capture.reserved_share,
            temperature=temperature,
            engine=config.engine.kind,
        )

    def regenerator(self, config: Config, temperature: float, max_tokens: int) -> Regenerator | None:
        """The target as a decoder, with the draft as it is at the moment beside it; None without a target."""
        if self.target is None:
            return None
        engine = build_engine(
            config, self.target, self.draft.model, self.tokenizer, capture=True, target_id=self.target_id
        )
        return Regenerator(engine, temperature=temperature, max_tokens=max_tokens, seed=config.seed)


def load_models(config: Config, wanted: Wanted) -> ReplayModels:
    """Load what the teacher needs.

    Raises:
      ConfigError: a model is missing that is needed. VocabularyMismatch: target and draft are not of one vocabulary.
    """
    device, dtype = placement(config, max(config.ray.decoder_gpus, config.ray.learner_gpus))
    learning, _ = load_draft(config, device, "float32", serving=False)
    target: PreTrainedModel | None = None
    why = "" if wanted != "black-box" else "--black-box"
    if not why:
        try:
            pair = load_pair(config, config.ray.decoder_gpus)
            target, draft, tokenizer, identity = pair
        except ConfigError as error:
            if wanted != "auto":
                raise
            why = str(error)
    if why:
        draft, identity = load_draft(config, device, dtype, serving=True)
        tokenizer = _tokenizer(config)
    limits = [m.config.get_text_config().max_position_embeddings for m in (target, draft.model) if m is not None]
    return ReplayModels(
        target=target,
        why_no_target=why,
        draft=draft,
        learning=learning,
        tokenizer=tokenizer,
        identity=identity,
        target_id=_target_id(config, target),
        max_length=min(config.engine.max_length, *map(int, limits)),
    )


def _tokenizer(config: Config) -> PreTrainedTokenizerBase:
    """The target's, which has the chat template; the draft's where only that is at hand."""
    with contextlib.suppress(ConfigError):
        return load.load_tokenizer(load.resolve(config.target.model, "target"))
    return load.load_tokenizer(load.resolve(config.draft.model, "draft"))


def _target_id(config: Config, target: PreTrainedModel | None) -> str:
    """What decoders write into traces: those of another target are removed when a daemon starts."""
    if target is None:
        try:
            target = load.load_causal_lm(load.resolve(config.target.model, "target"), dtype="auto", device="cpu")
        except ConfigError:
            return "unknown"
    return load.weights_id(target)[:16]
