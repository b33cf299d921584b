"""A request's life in the decoder: joining, stopping, aborting, and being refused."""

from collections.abc import Sequence

import pytest

from adaptd.decoding.capture import CaptureConfig
from adaptd.decoding.engine import SpeculativeDecoder
from adaptd.decoding.request import DecodeRequest, SamplingParams
from adaptd.errors import ContextLengthExceeded, Overloaded
from tests.unit.decoding.tiny import greedy_reference, make_draft, make_model, serve

VOCAB = 97
PROMPT = [5, 17, 40, 2]


def letters(ids: Sequence[int]) -> str:
    """Two characters a token, so that stop strings fall across tokens."""
    return "".join(f"{chr(97 + token // 10)}{token % 10}" for token in ids)


@pytest.fixture(scope="module")
def answer() -> list[int]:
    return greedy_reference(make_model(vocab=VOCAB), [PROMPT], 24)[0]


def engine_with(**extra: object) -> SpeculativeDecoder:
    target = make_model(vocab=VOCAB)
    settings: dict[str, object] = {"k": 3, "max_batch": 4, "max_length": 64}
    return SpeculativeDecoder(target, make_draft(target, noise=0.004), **(settings | extra))


def greedy(name: str = "r", prompt: Sequence[int] = PROMPT, **extra: object) -> DecodeRequest:
    settings: dict[str, object] = {"temperature": 0.0, "max_tokens": 24}
    return DecodeRequest(name, prompt, SamplingParams(**(settings | extra)))


@pytest.mark.parametrize("position", range(9))
def test_an_end_of_sequence_token_ends_the_answer_wherever_it_falls_in_a_round(
    answer: list[int], position: int
) -> None:
    eos = answer[position]
    first = answer.index(eos)
    done = serve(engine_with(eos_ids=[eos], detokenize=letters, capture=CaptureConfig()), [greedy()])["r"]
    assert done.token_ids == tuple(answer[: first + 1])
    assert done.finish_reason == "stop"
    assert done.text == letters(answer[:first])
    stats = done.stats
    assert stats.emitted == first + 1
    assert stats.reached_at[0] == stats.rounds
    assert done.trace is not None
    done.trace.validate()
    assert done.trace.response_len == first + 1
    assert (done.trace.source == 1).sum() == stats.accepted


def test_end_of_sequence_can_be_ignored(answer: list[int]) -> None:
    done = serve(engine_with(eos_ids=[answer[3]]), [greedy(ignore_eos=True)])["r"]
    assert done.token_ids == tuple(answer)
    assert done.finish_reason == "length"


@pytest.mark.parametrize("count", range(1, 10))
def test_max_tokens_is_kept_exactly_and_stats_count_what_was_emitted(answer: list[int], count: int) -> None:
    done = serve(engine_with(), [greedy(max_tokens=count)])["r"]
    assert done.token_ids == tuple(answer[:count])
    stats = done.stats
    assert stats.emitted == count
    assert stats.accepted <= count
    assert stats.accepted == sum(stats.accepted_at)
    assert stats.proposed <= 3 * stats.rounds
    assert sum(stats.reached_at) <= stats.proposed


def test_a_stop_string_across_tokens_cuts_text_and_tokens(answer: list[int]) -> None:
    whole = letters(answer)
    stop = whole[13:16]
    at = whole.index(stop)
    pieces: list[str] = []
    engine = engine_with(detokenize=letters)
    engine.add(greedy(stop=(stop,)))
    finished = None
    while finished is None:
        for delta in engine.step():
            pieces.append(delta.text)
            finished = delta.finished
    assert finished.text == "".join(pieces) == whole[:at]
    assert finished.finish_reason == "stop"
    needed = -(-(at + len(stop)) // 2)
    assert finished.token_ids == tuple(answer[:needed])
    assert engine.active == 0


def test_streamed_deltas_add_up_to_the_answer(answer: list[int]) -> None:
    engine = engine_with(detokenize=letters)
    engine.add(greedy())
    tokens: list[int] = []
    text = ""
    while engine.active:
        for delta in engine.step():
            tokens += delta.token_ids
            text += delta.text
    assert tokens == answer
    assert text == letters(answer)


def test_requests_that_join_while_others_decode_do_not_disturb_them(answer: list[int]) -> None:
    engine = engine_with()
    engine.add(greedy("first"))
    engine.step()
    engine.add(greedy("second"))
    done = serve(engine, [greedy("third"), greedy("fourth"), greedy("fifth")])
    assert {name: finished.token_ids for name, finished in done.items()} == dict.fromkeys(
        ("first", "second", "third", "fourth", "fifth"), tuple(answer)
    )


def test_an_abort_frees_the_slot_and_the_others_go_on(answer: list[int]) -> None:
    engine = engine_with(detokenize=letters, capture=CaptureConfig())
    for name in "abcd":
        engine.add(greedy(name))
    assert not engine.can_add()
    engine.step()
    engine.step()
    aborted = engine.abort("a")
    assert aborted is not None
    assert aborted.finish_reason == "abort"
    assert aborted.token_ids == tuple(answer[: len(aborted.token_ids)])
    assert aborted.trace is None
    assert engine.can_add()
    assert engine.abort("a") is None
    assert engine.abort("unknown") is None
    done = serve(engine, [greedy("e")])
    assert all(done[name].token_ids == tuple(answer) for name in "bcde")


def test_a_request_aborted_before_or_while_its_prompt_is_read_never_decodes(answer: list[int]) -> None:
    engine = engine_with(prefill_tokens=2)
    long = [*PROMPT, *range(30)]
    engine.add(greedy("waiting", long))
    assert engine.abort("waiting") is not None
    assert engine.active == 0
    engine.add(greedy("reading", long))
    engine.add(greedy("other"))
    engine.step()
    assert engine.abort("reading") is not None
    assert engine.abort("reading") is None
    done = serve(engine, [])
    assert done.keys() == {"other"}
    assert done["other"].token_ids == tuple(answer)


def test_a_prompt_as_long_as_the_context_is_refused_with_both_numbers() -> None:
    with pytest.raises(ContextLengthExceeded, match=r"64 tokens and the context 64"):
        engine_with().add(greedy(prompt=[1] * 64))


def test_what_can_never_be_served_is_refused_at_once() -> None:
    engine = engine_with()
    with pytest.raises(ValueError, match=r"prompt_ids \(97\)"):
        engine.check(greedy(prompt=[1, 97]))
    with pytest.raises(ValueError, match="stop needs text"):
        engine.check(greedy(stop=("x",)))
    for name in "abcd":
        engine.add(greedy(name))
    with pytest.raises(Overloaded, match="all 4 slots"):
        engine.add(greedy("e"))


@pytest.mark.parametrize("bad", [{"k": 0}, {"max_batch": 0}, {"max_length": 1}, {"prefill_tokens": 0}])
def test_a_number_out_of_range_is_refused_by_name(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        engine_with(**bad)


def test_a_context_longer_than_the_model_has_positions_is_refused() -> None:
    with pytest.raises(ValueError, match=r"max_length \(300\) must be at most 256"):
        engine_with(max_length=300)
