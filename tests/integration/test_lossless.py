"""The output is the target's, whatever the draft does: on the trained pair, against transformers."""

import copy
from typing import Any

import pytest
import torch

from adaptd.decoding.capture import CaptureConfig
from adaptd.decoding.engine import SpeculativeDecoder
from adaptd.decoding.request import DecodeRequest, Finished, SamplingParams
from adaptd.models.packed import can_pack, pack_linears
from adaptd.models.scope import AdaptedDraft, ScopeConfig
from policies.recall import Recall

PROMPTS_PER_DOMAIN = 50
TOKENS = 16
K = 4


def reference(target: Any, prompts: list[list[int]], eos: int) -> list[list[int]]:
    answers = []
    for prompt in prompts:
        out = target.generate(
            torch.tensor([prompt]), max_new_tokens=TOKENS, do_sample=False, pad_token_id=0, eos_token_id=eos
        )
        answers.append(out[0, len(prompt) :].tolist())
    return answers


def decode(
    engine: SpeculativeDecoder, prompts: list[list[int]], between: Any = None, **params: Any
) -> dict[int, Finished]:
    waiting = [
        DecodeRequest(str(i), p, SamplingParams(max_tokens=TOKENS, seed=i, **params)) for i, p in enumerate(prompts)
    ]
    done: dict[int, Finished] = {}
    while waiting or engine.active:
        while waiting and engine.can_add():
            engine.add(waiting.pop(0))
        done |= {int(d.request_id): d.finished for d in engine.step() if d.finished is not None}
        if between is not None:
            between(engine)
    return done


@pytest.fixture(scope="module")
def chosen(pocket_prompts: dict[str, list[list[int]]]) -> list[list[int]]:
    return [p for prompts in pocket_prompts.values() for p in prompts[:PROMPTS_PER_DOMAIN]]


@pytest.fixture(scope="module")
def expected(pocket_target: Any, pocket_tokenizer: Any, chosen: list[list[int]]) -> list[list[int]]:
    assert len(chosen) == 200
    return reference(pocket_target, chosen, pocket_tokenizer.eos_token_id)


@pytest.mark.parametrize(
    ("batch", "recalls", "packed"),
    [(1, False, True), pytest.param(8, False, False, marks=pytest.mark.slow), (8, True, True)],
    ids=str,
)
def test_greedy_output_equals_transformers_on_two_hundred_prompts(
    pocket_target: Any,
    pocket_draft: Any,
    pocket_tokenizer: Any,
    chosen: Any,
    expected: Any,
    batch: int,
    recalls: bool,
    packed: bool,
) -> None:
    target = copy.deepcopy(pocket_target) if packed else pocket_target
    # As decoders are built (`build_engine`).
    assert not packed or not can_pack(torch.float32) or pack_linears(target, rows=K + 1) > 0
    engine = SpeculativeDecoder(
        target,
        pocket_draft,
        k=K,
        max_batch=batch,
        max_length=320,
        eos_ids=[pocket_tokenizer.eos_token_id],
        capture=CaptureConfig(),
        recall=Recall() if recalls else None,
    )
    done = decode(engine, chosen, temperature=0.0)
    assert [list(done[i].token_ids) for i in range(len(chosen))] == expected
    mal = sum(f.stats.emitted for f in done.values()) / sum(f.stats.rounds for f in done.values())
    assert mal > 1.2, "the draft must be accepted now and then, or the test proves nothing"


def test_greedy_output_is_unchanged_by_swaps_in_the_middle(
    pocket_target: Any, pocket_draft: Any, pocket_tokenizer: Any, chosen: Any, expected: Any
) -> None:
    """New weights land between every two rounds: acceptance moves, tokens do not."""
    draft = AdaptedDraft(pocket_draft, ScopeConfig(), serving=True)
    generator = torch.Generator().manual_seed(0)
    swaps = 0

    def swap(engine: SpeculativeDecoder) -> None:
        nonlocal swaps
        state = {n: 0.05 * torch.randn(t.shape, generator=generator) for n, t in draft.state().items()}
        draft.load(state)
        swaps += 1
        engine.draft_version = swaps

    engine = SpeculativeDecoder(
        pocket_target, draft.model, k=K, max_batch=8, max_length=320, eos_ids=[pocket_tokenizer.eos_token_id]
    )
    some = list(range(0, 200, 5))
    done = decode(engine, [chosen[i] for i in some], between=swap, temperature=0.0)
    assert [list(done[j].token_ids) for j in range(len(some))] == [expected[i] for i in some]
    assert swaps > 20
    assert any(f.stats.draft_version_max > f.stats.draft_version_min for f in done.values())


@pytest.mark.slow
def test_joint_frequencies_of_the_first_two_tokens_are_the_targets(
    pocket_target: Any, pocket_draft: Any, pocket_prompts: Any
) -> None:
    """Chi-square over the pairs expected at least ten times in 20,480 draws, the rest in one cell; p > 0.01."""
    from scipy import stats

    draws, prompt = 20_480, min(pocket_prompts["math"], key=len)
    with torch.inference_mode():
        first = pocket_target(torch.tensor([prompt])).logits[0, -1].double().softmax(-1)
        top = first.topk(64).indices
        second = pocket_target(torch.tensor([[*prompt, t] for t in top.tolist()])).logits[:, -1].double().softmax(-1)
    joint = first[top, None] * second
    engine = SpeculativeDecoder(pocket_target, pocket_draft, k=K, max_batch=256, max_length=len(prompt) + 8)
    counts: dict[tuple[int, ...], int] = {}
    waiting = [
        DecodeRequest(str(i), prompt, SamplingParams(temperature=1.0, max_tokens=2, seed=i)) for i in range(draws)
    ]
    while waiting or engine.active:
        while waiting and engine.can_add():
            engine.add(waiting.pop())
        for delta in engine.step():
            if delta.finished is not None:
                counts[delta.finished.token_ids] = counts.get(delta.finished.token_ids, 0) + 1
    assert sum(counts.values()) == draws
    rows, columns = torch.where(joint * draws >= 10)
    expected = (joint[rows, columns] * draws).tolist()
    observed = [counts.get((int(top[r]), int(c)), 0) for r, c in zip(rows, columns, strict=True)]
    expected.append(draws - sum(expected))
    observed.append(draws - sum(observed))
    assert len(expected) > 30
    assert stats.chisquare(observed, expected).pvalue > 0.01
