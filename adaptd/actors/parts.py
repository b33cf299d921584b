"""What a decoder and the learner both build from the configuration: the models and the identity of their checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from adaptd.config import Config
from adaptd.learning.cycle import Identity, LearnerCycle
from adaptd.learning.evaluate import Rule
from adaptd.learning.learner import DraftLearner
from adaptd.models import load
from adaptd.models.scope import AdaptedDraft, ScopeConfig
from buffers.table import ReplayTable
from checkpoints.store import CheckpointStore


class Pair(NamedTuple):
    """A target, its draft and their tokenizer."""

    target: PreTrainedModel
    draft: AdaptedDraft
    tokenizer: PreTrainedTokenizerBase
    identity: Identity


def placement(config: Config, gpus: float) -> tuple[str, str]:
    """Device and dtype for a process that was given `gpus` of a GPU."""
    device = config.engine.device
    if device == "auto":
        device = "cuda" if gpus > 0 and torch.cuda.is_available() else "cpu"
    dtype = config.engine.dtype
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") else "float32"
    return device, dtype


def load_draft(config: Config, device: str, dtype: str, *, serving: bool) -> tuple[AdaptedDraft, Identity]:
    """The adapted draft at day 0, and what its checkpoints must match."""
    folder = load.resolve(config.draft.model, "draft")
    base = load.load_draft(folder, dtype=dtype, device=device)
    scope = ScopeConfig(**config.adapt.model_dump(), seed=config.seed)
    draft = AdaptedDraft(base.model, scope, serving=serving, base_id=base.base_id)
    identity = Identity(
        base_id=draft.base_id,
        tokenizer_hash=load.tokenizer_hash(load.load_tokenizer(folder)),
        scope=draft.scope,
        scope_config=draft.scope_config,
        config=config.model_dump(mode="json", include={"deployment", "adapt", "learn", "gate", "draft", "target"}),
    )
    return draft, identity


def draft_learner(config: Config, draft: AdaptedDraft) -> DraftLearner:
    """The optimiser that section `learn` asks for."""
    return DraftLearner(draft, k=config.engine.k, **config.learn.model_dump(include=set(DraftLearner.OPTIONS)))


def serving_rule(config: Config) -> Rule:
    """How the engine that serves accepts: adaptd's own by rejection sampling, vLLM as section `upstream` says."""
    greedy = config.engine.kind == "vllm" and config.upstream.draft_sampling == "greedy"
    return "greedy_draft" if greedy else "rejection"


def learner_cycle(
    config: Config,
    draft: AdaptedDraft,
    identity: Identity,
    table: ReplayTable,
    home: Path,
    rng: np.random.Generator,
) -> LearnerCycle:
    """The learner of one deployment; checkpoints and saved state lie in `home`."""
    return LearnerCycle(
        table,
        CheckpointStore(home / "checkpoints"),
        draft_learner(config, draft),
        identity,
        learn=config.learn,
        gate=config.gate,
        k=config.engine.k,
        state_file=home / "learner" / "state.safetensors",
        rng=rng,
        rule=serving_rule(config),
    )


def load_pair(config: Config, gpus: float) -> Pair:
    """Target and serving draft for a decoder.

    Raises:
      VocabularyMismatch: the two do not share one vocabulary.
    """
    device, dtype = placement(config, gpus)
    folder = load.resolve(config.target.model, "target")
    target = load.load_causal_lm(folder, dtype=dtype, device=device)
    tokenizer = load.load_tokenizer(folder)
    draft, identity = load_draft(config, device, dtype, serving=True)
    draft_tokenizer = load.load_tokenizer(load.resolve(config.draft.model, "draft"))
    load.check_same_vocabulary(target, draft.model, tokenizer, draft_tokenizer)
    return Pair(target, draft, tokenizer, identity)
