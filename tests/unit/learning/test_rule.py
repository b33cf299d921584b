"""Acceptance by the rule of the engine that serves."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from adaptd.actors.parts import serving_rule
from adaptd.config import load
from adaptd.decoding.request import Finished
from adaptd.learning.evaluate import profiles
from buffers.trace import Trace

K = 3


def rounds_of_greedy_draft(draft: torch.nn.Module, trace: Trace) -> int:
    """Decoding this text step by step: proposals are the draft's argmax, accepted where they are what the text says."""
    with torch.no_grad():
        logits = draft(torch.from_numpy(trace.tokens.astype(np.int64))[None]).logits[0]
    hit = logits.argmax(-1).numpy()[trace.judging_rows] == trace.response
    at = rounds = 0
    while at < trace.response_len:
        accepted = 0
        while accepted < K and at + accepted < trace.response_len and hit[at + accepted]:
            accepted += 1
        at += accepted + 1
        rounds += 1
    return rounds


def test_a_greedy_draft_is_judged_by_its_argmax_also_on_sampled_text(
    draft: torch.nn.Module, decode: Callable[..., list[Finished]]
) -> None:
    traces = [f.trace for f in decode(draft, 12, temperature=1.0) if f.trace]
    found = profiles(draft, traces, K, max_tokens=256, rule="greedy_draft")
    assert [p.rounds for p in found] == [rounds_of_greedy_draft(draft, t) for t in traces]
    other = profiles(draft, traces, K, max_tokens=256)
    assert [p.rounds for p in other] != [p.rounds for p in found], "the rules differ on sampled text"


def test_at_temperature_zero_the_rules_agree(draft: torch.nn.Module, decode: Callable[..., list[Finished]]) -> None:
    traces = [f.trace for f in decode(draft, 8, temperature=0.0) if f.trace]
    greedy, rejection = (
        [p.rounds for p in profiles(draft, traces, K, max_tokens=256, rule=rule)]  # type: ignore[arg-type]
        for rule in ("greedy_draft", "rejection")
    )
    assert greedy == rejection


@pytest.mark.parametrize(
    ("sets", "rule"),
    [
        ([], "rejection"),
        (["engine.kind=vllm"], "greedy_draft"),
        (["engine.kind=vllm", "upstream.draft_sampling=probabilistic"], "rejection"),
    ],
)
def test_the_rule_is_that_of_the_engine(sets: list[str], rule: str) -> None:
    assert serving_rule(load(None, sets)) == rule
