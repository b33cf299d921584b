"""Prompts are read in chunks that fit the rounds of the others, and what was read before is not read again."""

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from adaptd.decoding.engine import SpeculativeDecoder
from adaptd.decoding.prefill import STALL, SlotTokens
from adaptd.decoding.request import DecodeRequest, SamplingParams
from adaptd.decoding.timing import measure
from tests.unit.decoding.tiny import greedy_reference, make_draft, make_model, make_prompts, serve

VOCAB = 97
SYSTEM = make_prompts(1, VOCAB, shortest=30, longest=30)[0]


def engine_with(kind: str = "llama", **extra: Any) -> SpeculativeDecoder:
    target = make_model(kind, vocab=VOCAB)
    settings: dict[str, Any] = {"k": 3, "max_batch": 4, "max_length": 100}
    return SpeculativeDecoder(target, make_draft(target, noise=0.01), **(settings | extra))


def greedy(name: str, prompt: Sequence[int], tokens: int = 10) -> DecodeRequest:
    return DecodeRequest(name, prompt, SamplingParams(temperature=0.0, max_tokens=tokens))


def counted(engine: SpeculativeDecoder) -> list[int]:
    """Positions of each pass of the target that is none of a round."""
    found: list[int] = []
    forward = engine._target.forward

    def counting(tokens: torch.Tensor, *args: Any, of_round: bool = False, **options: Any) -> torch.Tensor:
        if not of_round:
            found.append(tokens.numel())
        return forward(tokens, *args, **options)

    engine._target.forward = counting  # type: ignore[method-assign]
    return found


def test_the_longest_common_beginning_wins() -> None:
    held = SlotTokens(4)
    for slot, tokens in ((0, [1, 2, 9]), (1, [1, 2, 3, 4, 5]), (2, []), (3, [7])):
        held.hold(slot, tokens)
    assert held.longest([1, 2, 3, 4, 6, 6], []) == (1, 4)
    assert held.longest([1, 2, 3], []) == (1, 3)
    assert held.longest([8], []) == (0, 0)
    assert held.longest([1, 2, 9, 9], [[1, 2, 9, 9, 9]]) == (0, 4), "active rows stand for their slots"


def test_a_shared_system_prompt_is_read_once() -> None:
    engine = engine_with()
    read = counted(engine)
    prompts = [[*SYSTEM, *p] for p in make_prompts(4, VOCAB, shortest=3, longest=9, seed=3)]
    answers = greedy_reference(make_model(vocab=VOCAB), prompts, 10)
    for at, prompt in enumerate(prompts):
        read.clear()
        done = serve(engine, [greedy(str(at), prompt)])[str(at)]
        assert list(done.token_ids) == answers[at]
        assert done.cached_tokens == (0 if at == 0 else len(SYSTEM))
        assert sum(read) == len(prompt) - 1 - done.cached_tokens


def test_a_conversation_goes_on_from_its_last_answer() -> None:
    engine = engine_with()
    first = serve(engine, [greedy("a", SYSTEM)])["a"]
    second = serve(engine, [greedy("b", [*SYSTEM, *first.token_ids, 5, 6, 7])])["b"]
    # The last token of an answer is never fed.
    assert second.cached_tokens == len(SYSTEM) + len(first.token_ids) - 1
    same = greedy_reference(make_model(vocab=VOCAB), [[*SYSTEM, *first.token_ids, 5, 6, 7]], 10)[0]
    assert list(second.token_ids) == same


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3"])
@pytest.mark.parametrize("seed", range(3))
def test_whoever_comes_and_goes_the_output_stays(kind: str, seed: int) -> None:
    """Requests with common beginnings arrive, end and are aborted at random, in a small chunk of prompt a step."""
    rng = random.Random(seed)
    prompts = [[*SYSTEM[: rng.choice((0, 10, 30))], *p] for p in make_prompts(24, VOCAB, seed=seed)]
    answers = greedy_reference(make_model(kind, vocab=VOCAB), prompts, 12)
    engine = engine_with(kind, prefill_tokens=rng.choice((3, 16, 200)))
    aborted: set[str] = set()

    def between(_round: int) -> None:
        if rng.random() < 0.1:
            name = str(rng.randrange(24))
            if engine.abort(name) is not None:
                aborted.add(name)
        if rng.random() < 0.2:
            measure(engine)

    done = serve(engine, [greedy(str(i), p, 12) for i, p in enumerate(prompts)], between)
    assert len(done) + len(aborted) == 24
    assert len(done) > 12
    for name, finished in done.items():
        assert list(finished.token_ids) == answers[int(name)], name
    assert any(finished.cached_tokens for finished in done.values())


def test_what_the_idle_engine_timed_is_not_taken_for_a_prompt() -> None:
    """Timing without rows writes over the first slot."""
    engine = engine_with()
    serve(engine, [greedy("a", SYSTEM)])
    measure(engine)
    done = serve(engine, [greedy("b", [*SYSTEM, 4, 5])])["b"]
    assert done.cached_tokens == 0
    assert list(done.token_ids) == greedy_reference(make_model(vocab=VOCAB), [[*SYSTEM, 4, 5]], 10)[0]


def test_it_can_be_turned_off() -> None:
    engine = engine_with(prefix_caching=False)
    done = serve(engine, [greedy("a", SYSTEM)]) | serve(engine, [greedy("b", SYSTEM)])
    assert done["b"].cached_tokens == 0


def test_a_long_prompt_is_read_in_the_time_of_a_few_rounds_while_others_are_answered() -> None:
    """A clock that moves by one for each position the target reads, and by eight for a round."""
    engine = engine_with(max_length=256, prefix_caching=False)
    now = [0.0]
    engine._prefill._clock = lambda: now[0]
    forward = engine._target.forward
    chunks: list[int] = []

    def timed(tokens: torch.Tensor, *args: Any, of_round: bool = False, **options: Any) -> torch.Tensor:
        if not of_round:
            now[0] += tokens.numel()
            chunks.append(tokens.numel())
        return forward(tokens, *args, **options)

    engine._target.forward = timed  # type: ignore[method-assign]
    long = make_prompts(1, VOCAB, shortest=120, longest=120)[0]
    serve(engine, [greedy("alone", long, 1)])
    assert chunks == [119], "nobody waits for a round"
    chunks.clear()
    engine.add(greedy("first", SYSTEM, 40))
    engine.step()
    for _ in range(60):
        engine._prefill.played(40.0 / STALL)
    chunks.clear()
    engine.add(greedy("long", long, 1))
    engine.step()
    assert chunks == [40]
    for _ in range(60):
        engine._prefill.played(0.001)
    engine.step()
    assert chunks == [40, 16], "a shorter chunk would read the weights for hardly anything"
