"""What the target says behind tokens that it nearly said: exactly what a forward pass over that text says."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from adaptd.decoding.alternatives import Asking, draw_alternatives
from adaptd.decoding.capture import CaptureConfig
from adaptd.decoding.engine import SpeculativeDecoder
from adaptd.decoding.request import DecodeRequest, SamplingParams
from buffers.synthetic import synthetic_trace
from buffers.trace import Trace
from tests.unit.decoding.tiny import make_draft, make_model, make_prompts, serve

VOCAB, K, KEPT = 97, 3, 6


def engine_for(target: torch.nn.Module, *, alternatives: int = 2, **extra: Any) -> SpeculativeDecoder:
    kept: dict[str, Any] = {"k_top": 12, "k_draft": 2, "k_branch": KEPT, "reserved_share": 0.0}
    capture = CaptureConfig(alternatives=alternatives, **(kept | extra.pop("capture", {})))
    settings: dict[str, Any] = {"k": K, "max_batch": 4, "max_length": 80}
    return SpeculativeDecoder(target, make_draft(target, noise=0.02), capture=capture, **(settings | extra))


def served(engine: SpeculativeDecoder, prompts: Sequence[Sequence[int]], temperature: float = 1.0) -> list[Trace]:
    params = SamplingParams(temperature=temperature, max_tokens=11)
    done = serve(engine, [DecodeRequest(str(i), p, params) for i, p in enumerate(prompts)])
    traces = [done[str(i)].trace for i in range(len(prompts))]
    assert all(trace is not None for trace in traces)
    return traces  # type: ignore[return-value]


def asked(engine: SpeculativeDecoder, trace: Trace) -> Trace:
    asking = engine.asking(trace)
    assert asking is not None
    while not engine.ask(asking):
        pass
    return asking.answered()


def assert_true(target: torch.nn.Module, trace: Trace, before: Trace) -> None:
    """Each further branch has what the target says behind it, as transformers computes it."""
    trace.validate()
    found = trace.branches
    assert found is not None
    old = 0 if before.branches is None else len(before.branches.lens)
    assert (found.lens[old:] == 1).all()
    assert len(found.at) > old + trace.response_len // 2
    first = int(found.lens[:old].sum())
    for at, token, ids, logprobs in zip(
        found.at[old:], found.tokens[first:], found.topk_ids[first:], found.topk_logprobs[first:], strict=True
    ):
        text = [*trace.tokens[: trace.prompt_len + at].tolist(), int(token)]
        with torch.inference_mode():
            expected = target(input_ids=torch.tensor([text])).logits[0, -1].log_softmax(-1)
        assert token != trace.response[at]
        np.testing.assert_allclose(logprobs, expected[ids.astype(np.int64)].numpy(), atol=4e-3)
        np.testing.assert_allclose(logprobs, expected.topk(KEPT).values.numpy(), atol=4e-3)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_the_target_says_what_it_would_have_said(kind: str, temperature: float) -> None:
    target = make_model(kind, vocab=VOCAB)
    engine = engine_for(target)
    prompts = make_prompts(4, VOCAB, shortest=1, longest=30)
    for trace in served(engine, prompts, temperature):
        assert_true(target, asked(engine, trace), trace)


def test_a_model_that_transformers_runs_says_the_same() -> None:
    target = make_model(vocab=VOCAB, attn_implementation="eager")
    engine = engine_for(target)
    assert engine._target._lean is None
    (trace,) = served(engine, make_prompts(1, VOCAB, shortest=20, longest=30))
    assert_true(target, asked(engine, trace), trace)


def test_an_answer_that_the_cache_has_lost_is_read_once_more() -> None:
    target = make_model(vocab=VOCAB)
    engine = engine_for(target, max_batch=1)
    first, second = served(engine, make_prompts(2, VOCAB, shortest=25, longest=40))
    passes = counted(engine)
    assert_true(target, asked(engine, second), second)
    assert sum(passes) == len(second.response) * 2 - missing(second, 2), "nothing but alternatives"
    passes.clear()
    engine._prefill._token_s = engine._prefill._round_s / 40
    assert_true(target, asked(engine, first), first)
    assert sum(passes) == len(first.tokens) - 1 + len(first.response) * 2 - missing(first, 2)
    assert max(passes) == 20, "as much as is read in half a round, which is what a request may have to wait"


def missing(trace: Trace, n: int) -> int:
    """Alternatives that are too rare to be asked about."""
    return n * trace.response_len - len(draw_alternatives(trace, n, np.random.default_rng(0))[0])


def counted(engine: SpeculativeDecoder) -> list[int]:
    found: list[int] = []
    forward = engine._target.forward

    def counting(tokens: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        found.append(tokens.numel())
        return forward(tokens, *args, **options)

    engine._target.forward = counting  # type: ignore[method-assign]
    return found


def test_requests_in_between_change_neither_their_tokens_nor_what_is_asked() -> None:
    target = make_model(vocab=VOCAB)
    engine, alone = engine_for(target, alternatives=8), engine_for(target, alternatives=0)
    prompts = make_prompts(6, VOCAB, shortest=20, longest=40)
    greedy = SamplingParams(temperature=0.0, max_tokens=11)
    (trace,) = served(engine, prompts[:1], 0.0)
    served(alone, prompts[:1], 0.0)
    asking = engine.asking(trace)
    assert asking is not None
    for i, prompt in enumerate([prompts[0], *prompts[1:]]):
        # The same prompt as well: it begins like what alternatives were written behind.
        requests = [DecodeRequest(f"{i}-{j}", p, greedy) for j, p in enumerate((prompt, prompts[0]))]
        together, expected = serve(engine, requests), serve(alone, requests)
        assert {n: f.token_ids for n, f in together.items()} == {n: f.token_ids for n, f in expected.items()}
        if asking.done < len(asking.at):
            engine.ask(asking)
    while asking.done < len(asking.at):
        engine.ask(asking)
    assert_true(target, asking.answered(), trace)


def test_alternatives_have_draws_as_answers_have() -> None:
    target = make_model(vocab=VOCAB)
    engine = engine_for(target, capture={"k_tail": 3, "k_branch": 12})
    (trace,) = served(engine, make_prompts(1, VOCAB, shortest=20, longest=30))
    whole = asked(engine, trace)
    whole.validate()
    assert whole.branches is not None
    assert trace.branches is not None
    assert len(whole.branches.tokens) > len(trace.branches.tokens)
    assert whole.branches.tail_ids is not None
    assert whole.branches.tail_ids.shape == (len(whole.branches.tokens), 3)
    assert not (whole.branches.tail_ids[:, :, None] == whole.branches.topk_ids[:, None]).any()


def test_what_was_asked_so_far_is_kept() -> None:
    engine = engine_for(make_model(vocab=VOCAB), alternatives=6)
    (trace,) = served(engine, make_prompts(1, VOCAB, shortest=20, longest=20))
    engine._prefill._token_s = engine._prefill._round_s  # passes as short as they may be
    asking = engine.asking(trace)
    assert asking is not None
    assert asking.answered() is trace
    assert not engine.ask(asking)
    some = asking.answered()
    some.validate()
    assert some.branches is not None
    assert trace.branches is not None
    assert 0 < len(some.branches.lens) - len(trace.branches.lens) == asking.done < len(asking.at)


@pytest.mark.parametrize(
    ("extra", "kind"),
    [
        ({"alternatives": 0}, "llama"),
        ({"capture": {"positions": "rejected"}}, "llama"),
        ({"prefix_caching": False}, "llama"),
        ({}, "mistral"),
    ],
    ids=["none wanted", "corrections alone", "unknown slots", "a window"],
)
def test_who_is_not_asked(extra: dict[str, Any], kind: str) -> None:
    window = {"sliding_window": 12} if kind == "mistral" else {}
    engine = engine_for(make_model(kind, vocab=VOCAB, **window), **extra)
    (trace,) = served(engine, make_prompts(1, VOCAB, shortest=20, longest=20))
    assert engine.asking(trace) is None


def test_what_the_gate_judges_by_is_not_learned_from() -> None:
    engine = engine_for(make_model(vocab=VOCAB))
    trace = synthetic_trace(np.random.default_rng(0), vocabulary=VOCAB, reserved=True)
    assert engine.asking(trace) is None


def test_slots_that_requests_use_are_not_written() -> None:
    engine = engine_for(make_model(vocab=VOCAB))
    (trace,) = served(engine, make_prompts(1, VOCAB, shortest=20, longest=20))
    asking = engine.asking(trace)
    assert asking is not None
    engine.add(DecodeRequest("r", [1, 2, 3], SamplingParams()))
    with pytest.raises(RuntimeError, match="1 requests are here"):
        engine.ask(asking)


def trace_of(probs: Sequence[Sequence[float]], emitted: Sequence[int], temperature: float) -> Trace:
    logprobs = np.log(np.array(probs)).astype(np.float16)
    ids = np.tile(np.arange(logprobs.shape[1], dtype=np.uint32), (len(logprobs), 1))
    made = synthetic_trace(np.random.default_rng(0), n_prompt=2, n_response=len(emitted), temperature=temperature)
    tokens = np.concatenate([made.tokens[:2], np.array(emitted, np.uint32)])
    return Trace(
        **(
            {n: getattr(made, n) for n in made.__dataclass_fields__}
            | {"tokens": tokens, "topk_ids": ids, "topk_logprobs": logprobs}
        )
    )


@pytest.mark.parametrize(("temperature", "power"), [(1.0, 1.0), (0.5, 2.0), (0.0, 1.0)])
def test_they_are_drawn_as_the_target_would_have(temperature: float, power: float) -> None:
    p = np.array([0.4, 0.3, 0.2, 0.1])
    trace = trace_of([p] * 4000, [0] * 4000, temperature)
    at, tokens = draw_alternatives(trace, 1, np.random.default_rng(3))
    assert at.tolist() == list(range(4000))
    expected = p[1:] ** power / (p[1:] ** power).sum()
    np.testing.assert_allclose(np.bincount(tokens, minlength=4)[1:] / 4000, expected, atol=0.03)
    assert not (tokens == 0).any(), "what was emitted is no alternative"


def test_rare_tokens_are_left_out_and_none_comes_twice() -> None:
    trace = trace_of([[0.985, 0.009, 0.006], [0.5, 0.3, 0.2], [0.98, 0.012, 0.008]], [0, 1, 0], 1.0)
    at, tokens = draw_alternatives(trace, 3, np.random.default_rng(0))
    assert at.tolist() == [1, 1, 2]
    assert sorted(tokens[:2].tolist()) == [0, 2]
    assert tokens[2] == 1
    assert Asking(trace, at, tokens).done == 0
