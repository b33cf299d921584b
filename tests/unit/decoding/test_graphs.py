"""Captured passes: whatever is not an input is a constant, and the output stays what it was.

There is no GPU here. The operations of a pass are traced as they run, and the trace is what runs afterwards: as in a
CUDA graph, no Python of the pass is left, and every tensor that is not an input is read and written where it was.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import structlog
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from adaptd import events
from adaptd.decoding.capture import CaptureConfig
from adaptd.decoding.engine import SpeculativeDecoder
from adaptd.decoding.graphs import cuda_graph
from adaptd.decoding.request import DecodeRequest, SamplingParams
from policies.recall import Recall
from tests.unit.decoding.test_engine_request_gate import adapted
from tests.unit.decoding.tiny import disturb, greedy_reference, make_draft, make_model, make_prompts, serve

VOCAB = 97


def traced(run: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    trace = make_fx(run)(*inputs)
    return lambda: tuple(trace(*inputs))


def engines(kind: str, noise: float = 0.01, **extra: Any) -> tuple[SpeculativeDecoder, SpeculativeDecoder]:
    """With captured passes and without, each with models of its own."""
    found = []
    for capture in (traced, None):
        target = make_model(kind, vocab=VOCAB)
        draft = make_draft(target, noise=noise)
        settings: dict[str, Any] = {"k": 3, "max_batch": 3, "max_length": 90}
        found.append(SpeculativeDecoder(target, draft, capture_passes=capture, **(settings | extra)))
    return found[0], found[1]


def requests(temperature: float, count: int = 10) -> list[DecodeRequest]:
    return [
        DecodeRequest(str(i), p, SamplingParams(temperature=temperature, max_tokens=9 + 5 * (i % 5), seed=i))
        for i, p in enumerate(make_prompts(count, VOCAB, longest=50))
    ]


@pytest.mark.parametrize(
    ("kind", "temperature"),
    [
        ("llama", 0.0),
        ("llama", 1.0),
        ("qwen3", 1.0),
        pytest.param("mistral", 0.0, marks=pytest.mark.slow),
        pytest.param("mistral", 1.0, marks=pytest.mark.slow),
    ],
)
def test_requests_that_come_and_go_get_the_same_tokens(kind: str, temperature: float) -> None:
    """Batches of one to three rows, filled up to four; lengths over several buckets."""
    captured, plain = engines(kind)
    assert captured._target.graphs is not None
    assert plain._target.graphs is None
    found = [
        {name: (f.token_ids, f.stats.rounds, f.stats.accepted) for name, f in serve(e, requests(temperature)).items()}
        for e in (captured, plain)
    ]
    assert found[0] == found[1]
    for runner in (captured._target, captured._draft):
        assert runner.graphs is not None
        # Sizes 1, 2, 3; lengths 32, 64, 96: a verification, or all passes of the draft, of each.
        assert 0 < len(runner.graphs) <= 3 * 3


@pytest.mark.parametrize(
    "mixture",
    [
        "both",
        "truncated",
        pytest.param("greedy", marks=pytest.mark.slow),
        pytest.param("sampled", marks=pytest.mark.slow),
    ],
)
def test_recall_and_a_gated_draft_inside_the_draft_s_graph(mixture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is remembered changes between rounds, and so do weights of its sources; both are seen by what was captured."""
    # On a CPU the sort is numpy's, which no trace can see.
    monkeypatch.setattr("policies.warp._descending", lambda probs: probs.sort(-1, descending=True).values)
    prompts = make_prompts(6, VOCAB, longest=30)
    found = []
    for capture in (traced, None):
        target = make_model(vocab=VOCAB)
        engine = SpeculativeDecoder(
            target,
            adapted(target).model,
            k=3,
            max_batch=2,
            max_length=60,
            capture=CaptureConfig(),
            recall=Recall(entries=4096, seeded=True),
            capture_passes=capture,
        )
        given = []
        for i, prompt in enumerate([*prompts, *prompts]):
            warm = mixture != "greedy" and not (mixture == "both" and i % 2)
            cut: dict[str, Any] = {"top_p": 0.7, "top_k": 20} if mixture == "truncated" and i % 3 else {}
            params = SamplingParams(temperature=0.7 * warm, max_tokens=16, seed=i % 6, **cut)
            given.append(DecodeRequest(str(i), prompt, params, domain="ab"[i % 2]))
        done = serve(engine, given)
        assert engine.recalled > 20
        found.append({name: (f.token_ids, f.stats.rounds, f.stats.accepted) for name, f in done.items()})
        rounds = [sum(done[str(i)].stats.rounds for i in half) for half in (range(6), range(6, 12))]
        assert rounds[1] < rounds[0], "what was served is recalled"
    assert found[0] == found[1]


def test_all_passes_of_the_draft_are_one_graph() -> None:
    captured, _ = engines("llama", k=3)
    counted = []

    def counting(run: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        counted.append(len(inputs))
        return traced(run, inputs)

    for runner in (captured._target, captured._draft):
        assert runner.graphs is not None
        runner.graphs._capture = counting
    prompt = make_prompts(1, VOCAB, shortest=6, longest=6)
    serve(captured, [DecodeRequest("0", prompt[0], SamplingParams(temperature=0.0, max_tokens=16))])
    assert len(counted) == 2, "one of the draft's three passes and one of the target's"


def test_what_cannot_be_captured_is_run_as_it_is() -> None:
    tried = []

    def refused(run: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        tried.append(run)
        raise RuntimeError("operation not permitted when stream is capturing")

    captured, plain = engines("llama")
    for runner in (captured._target, captured._draft):
        assert runner.graphs is not None
        runner.graphs._capture = refused
    with structlog.testing.capture_logs() as logs:
        found = [{n: f.token_ids for n, f in serve(e, requests(1.0, 4)).items()} for e in (captured, plain)]
    assert found[0] == found[1]
    assert len(tried) == 2, "once a model"
    assert [entry["event"] for entry in logs] == [events.GRAPHS_FAILED] * 2


def test_greedy_output_is_transformers_own() -> None:
    captured, _ = engines("llama")
    prompts = make_prompts(6, VOCAB)
    answers = greedy_reference(make_model("llama", vocab=VOCAB), prompts, 16)
    given = [DecodeRequest(str(i), p, SamplingParams(temperature=0.0, max_tokens=16)) for i, p in enumerate(prompts)]
    done = serve(captured, given)
    assert [list(done[str(i)].token_ids) for i in range(6)] == answers


def test_a_swap_acts_in_captured_passes() -> None:
    """Weights are copied in place between two rounds: acceptance changes, output does not."""
    captured, _ = engines("llama", noise=0.3)
    first = serve(captured, requests(0.0))
    good = make_model("llama", vocab=VOCAB)
    for mine, theirs in zip(captured._draft.model.parameters(), good.parameters(), strict=True):
        mine.data.copy_(theirs)
    second = serve(captured, requests(0.0))
    assert {n: f.token_ids for n, f in first.items()} == {n: f.token_ids for n, f in second.items()}
    accepted = [sum(f.stats.accepted for f in done.values()) for done in (first, second)]
    assert accepted[1] > 2 * accepted[0] + 10
    disturb(captured._draft.model, 0.3, 5)
    third = sum(f.stats.accepted for f in serve(captured, requests(0.0)).values())
    assert third < accepted[1] / 2


def test_rows_that_fill_up_a_batch_write_nowhere_else() -> None:
    """While three rows of five slots decode, in passes of four, the prompts of joining rows are in the slots behind."""
    rng = random.Random(0)
    target = make_model(vocab=VOCAB)
    prompts = [make_prompts(1, VOCAB, shortest=s, longest=s, seed=s)[0] for s in (5, 9, 14, 40, 44, 47, 6, 30)]
    answers = greedy_reference(target, prompts, 20)
    engine = SpeculativeDecoder(
        target, make_draft(target), k=3, max_batch=5, max_length=90, prefill_tokens=4, capture_passes=traced
    )
    given = [DecodeRequest(str(i), p, SamplingParams(temperature=0.0, max_tokens=20)) for i, p in enumerate(prompts)]
    rng.shuffle(given)
    done = serve(engine, given)
    assert [list(done[str(i)].token_ids) for i in range(8)] == answers


@pytest.mark.gpu
@pytest.mark.parametrize("recalls", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_on_a_gpu_graphs_give_the_same_tokens(temperature: float, recalls: bool) -> None:
    found = []
    for capture in (cuda_graph, None):
        target = make_model(vocab=VOCAB).cuda()
        draft = make_draft(target, noise=0.01)
        engine = SpeculativeDecoder(
            target,
            draft,
            k=3,
            max_batch=3,
            max_length=90,
            capture=CaptureConfig(),
            recall=Recall(entries=4096, seeded=True, device="cuda") if recalls else None,
            capture_passes=capture,
        )
        done = serve(engine, requests(temperature))
        found.append({name: (f.token_ids, f.stats.rounds) for name, f in done.items()})
    assert found[0] == found[1]
