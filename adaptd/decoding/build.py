"""A decoder from the configuration."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from adaptd.config import Config
from adaptd.decoding.capture import CaptureConfig
from adaptd.decoding.engine import SpeculativeDecoder
from adaptd.decoding.graphs import cuda_graph
from adaptd.decoding.loop import DecodeLoop
from adaptd.models.packed import pack_linears
from policies.draft_length import DraftLength
from policies.recall import Recall


def eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Every token that ends an answer: the tokenizer's, and those of the model's generation settings."""
    listed = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = set(listed if isinstance(listed, list) else [listed]) | {tokenizer.eos_token_id}
    return {i for i in ids if i is not None}


def build_recall(config: Config, device: torch.device | str) -> Recall | None:
    """The memory of one decoder, if it is to have one."""
    c = config.recall
    if not c.enabled:
        return None
    return Recall(orders=c.orders, echo=c.echo, entries=c.entries, width=c.width, seeded=c.seeded, device=device)


def build_engine(
    config: Config,
    target: PreTrainedModel,
    draft: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    capture: bool,
    target_id: str = "",
    draft_length: DraftLength | None = None,
) -> SpeculativeDecoder:
    """The engine of one decoder. The target's linear layers are packed for the CPU in place (`pack_linears`)."""
    pack_linears(target, rows=config.engine.k + 1, compiled=config.engine.compiled)

    def detokenize(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=True))

    device = next(target.parameters()).device
    context = min(int(m.config.max_position_embeddings) for m in (target, draft))
    c = config.capture
    return SpeculativeDecoder(
        target,
        draft,
        k=config.engine.k,
        max_batch=config.engine.max_batch,
        max_length=min(config.engine.max_length, context),
        prefill_tokens=config.engine.prefill_tokens,
        prefix_caching=config.engine.prefix_caching,
        capture_passes=cuda_graph if config.engine.cuda_graphs and device.type == "cuda" else None,
        compiled=config.engine.compiled,
        eos_ids=eos_ids(target, tokenizer),
        detokenize=detokenize,
        capture=CaptureConfig(
            k_top=c.k_top,
            k_tail=c.k_tail,
            k_draft=c.k_draft,
            k_branch=c.k_branch,
            alternatives=config.capture.asked,
            positions=c.positions,
            max_tokens=c.max_tokens,
            reserved_share=c.reserved_share,
            target_id=target_id,
            engine="native",
        )
        if capture
        else None,
        # Without capture nothing would ever be remembered, and what is measured is the draft alone.
        recall=build_recall(config, device) if capture else None,
        draft_length=draft_length,
    )


def build_loop(
    config: Config, target: PreTrainedModel, draft: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, target_id: str
) -> DecodeLoop:
    """The engine in its thread."""
    length = DraftLength(config.engine.k) if config.engine.draft_length == "auto" else None
    engine = build_engine(config, target, draft, tokenizer, capture=True, target_id=target_id, draft_length=length)
    return DecodeLoop(engine, max_queue=config.engine.max_queue, name=f"adaptd-decode-{os.getpid()}")
