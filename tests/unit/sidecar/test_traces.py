"""Steps to sources, answers to traces."""

import numpy as np
import pytest

from adaptd.sidecar.answer import ChoiceSeen, Seen
from adaptd.sidecar.steps import Figures, Steps, figures
from adaptd.sidecar.traces import Incomplete, Provenance, build, served_logprob, settings
from buffers.trace import Source

U, C, A, B = Source.UNKNOWN, Source.CORRECTION, Source.ACCEPTED, Source.BONUS


@pytest.mark.parametrize(
    ("accepted", "drafted", "size", "expected"),
    [
        ((4, 0, 1), (4, 4, 4), 9, [U, A, A, A, A, B, C, A, C]),
        ((4, 0, 1), (4, 4, 4), 8, [U, A, A, A, A, B, C, A]),  # the last step was cut
        ((0,), (4,), 2, [U, C]),
        ((), (), 1, [U]),
        ((2,), (2,), 4, [U, A, A, B]),  # a shorter draft, all accepted: the bonus
        ((4, 4), (4, 4), 7, [U, A, A, A, A, B, A]),
        ((4, 4), (4, 4), 6, [U] * 6),  # nothing of the last step came out: these counts are of something else
        ((0,), (4,), 4, [U] * 4),  # steps without proposals are not in the counts
    ],
)
def test_sources_follow_the_steps(
    accepted: tuple[int, ...], drafted: tuple[int, ...], size: int, expected: list[int]
) -> None:
    assert Steps(accepted, drafted).sources(size).tolist() == expected


def test_depths_count_what_was_judged() -> None:
    reached, passed = Steps((4, 0, 1, 2), (4, 4, 4, 2)).by_depth()
    assert reached == (4, 3, 1, 1), "the shorter draft did not get to depth 2"
    assert passed == (3, 2, 1, 1)


def test_figures_are_read_leniently() -> None:
    whole = {"num_spec_steps": 2, "num_draft_tokens": 8, "num_accepted_draft_tokens": 3, "num_spec_tokens": 4}
    assert figures(whole) == Figures(2, 8, 3, 4, None)
    assert figures({**whole, "per_step_accepted": [1, 2], "per_step_drafted": [4, 4], "new": 1}) == Figures(
        2, 8, 3, 4, Steps((1, 2), (4, 4))
    )
    for wrong in (
        {"per_step_accepted": [5], "per_step_drafted": [4]},
        {"per_step_accepted": [1], "per_step_drafted": [4, 4]},
    ):
        found = figures({**whole, **wrong})
        assert found is not None
        assert found.steps is None
    assert figures(None) is None
    assert figures({"num_spec_steps": None}) is None


def about(**changes: object) -> Provenance:
    plain: dict[str, object] = {
        "target_id": "t",
        "draft_version": 3,
        "domain": "math",
        "tenant": "x",
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "max_tokens": 100,
        "reserved_share": 0.0,
    }
    return Provenance(**{**plain, **changes})  # type: ignore[arg-type]


def chat_position(emitted: int, *pairs: tuple[int, float]) -> dict[str, object]:
    known = dict(pairs)
    return {
        "token": f"token_id:{emitted}",
        "logprob": known.get(emitted, -9.0),
        "top_logprobs": [{"token": f"token_id:{t}", "logprob": p} for t, p in pairs],
    }


def seen() -> Seen:
    positions = [
        chat_position(7, (7, -0.1), (8, -3.0), (9, -4.0)),
        chat_position(5, (5, -9.0), (8, -0.2), (9, -3.0)),  # emitted from below the list: vLLM puts it first
    ]
    choice = ChoiceSeen([7, 5], [{"content": positions[:1]}, {"content": positions[1:]}], None, "stop")
    return Seen({0: choice}, prompt_token_ids=[1, 2, 3], answer_id="chatcmpl-1")


def test_a_chat_answer_becomes_a_trace() -> None:
    (trace,) = build(seen(), Figures(1, 4, 0, 4, Steps((0,), (4,))), about())
    assert trace.tokens.tolist() == [1, 2, 3, 7, 5]
    assert trace.prompt_len == 3
    assert trace.topk_ids.tolist() == [[7, 8, 9], [8, 9, 5]]
    assert np.allclose(trace.topk_logprobs, [[-0.1, -3, -4], [-0.2, -3, -9]], atol=0.01)
    assert trace.source.tolist() == [U, C]
    assert np.allclose(trace.target_logprob, [-0.1, -9], atol=0.01)
    assert np.isnan(trace.draft_logprob).all()
    assert (trace.engine, trace.surprise, trace.request_id, trace.draft_version) == ("vllm", 1.0, "chatcmpl-1", 3)


def test_a_completion_answer_becomes_a_trace() -> None:
    piece = {
        "tokens": ["token_id:7", "token_id:5"],
        "token_logprobs": [-0.1, -9.0],
        "top_logprobs": [
            {"token_id:7": -0.1, "token_id:8": -3.0},
            {"token_id:5": -9.0, "token_id:8": -0.2, "token_id:9": -3.0},
        ],
    }
    found = Seen({0: ChoiceSeen([7, 5], [piece], [1], "stop")}, answer_id="cmpl-1")
    (trace,) = build(found, None, about())
    assert trace.topk_ids.tolist() == [[7, 8], [8, 9]]
    assert trace.source.tolist() == [U, U]


def test_several_choices_are_several_traces_and_nothing_is_said_of_their_steps() -> None:
    both = seen()
    both.choices[1] = both.choices[0]
    found = build(both, Figures(1, 4, 0, 4, Steps((0,), (4,))), about())
    assert [t.request_id for t in found] == ["chatcmpl-1-0", "chatcmpl-1-1"]
    assert all((t.source == U).all() for t in found)


@pytest.mark.parametrize("missing", ["prompt", "tokens", "logprobs", "ids", "depth", "others"])
def test_an_answer_that_does_not_say_enough_is_refused(missing: str) -> None:
    found = seen()
    choice = found.choices[0]
    if missing == "prompt":
        found.prompt_token_ids = None
    elif missing == "tokens":
        choice.token_ids = []
    elif missing == "logprobs":
        choice.logprobs.pop()
    elif missing == "ids":
        choice.logprobs[0]["content"][0]["token"] = "What"
    elif missing == "others":
        choice.token_ids = [7, 6]
    else:
        del choice.logprobs[0]["content"][0]["top_logprobs"]
    with pytest.raises(Incomplete):
        build(found, None, about())


def test_a_long_trace_is_cut_on_the_left() -> None:
    (trace,) = build(seen(), None, about(max_tokens=3))
    assert trace.tokens.tolist() == [3, 7, 5]


def exact(logits: np.ndarray, token: int, temperature: float, top_p: float, top_k: int) -> float:
    """The served log p over the whole vocabulary."""
    scaled = logits / temperature
    order = np.argsort(-scaled)
    weights = np.exp(scaled - scaled.max())
    if top_k:
        weights[order[top_k:]] = 0
    weights /= weights.sum()
    if top_p < 1:
        before = np.cumsum(weights[order]) - weights[order]
        weights[order[before >= top_p]] = 0
    return float(np.log(weights[token] / weights.sum()))


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k", "tolerance"),
    [
        (1.0, 1.0, 0, 1e-9),
        (0.5, 1.0, 0, 0.01),
        (1.0, 0.8, 0, 1e-6),
        (0.7, 0.9, 0, 0.02),
        (1.3, 1.0, 4, 1e-6),
        (1.5, 1.0, 0, 0.5),
    ],
)
def test_the_served_distribution_is_rebuilt_from_the_list(
    temperature: float, top_p: float, top_k: int, tolerance: float
) -> None:
    logits = np.random.default_rng(0).normal(size=50) * 4
    logprobs = logits - np.log(np.exp(logits).sum())
    order = np.argsort(-logprobs)[:12]
    found = served_logprob(logprobs[order[:1]], logprobs[order][None], temperature, top_p, top_k)
    assert found[0] == pytest.approx(exact(logits, int(order[0]), temperature, top_p, top_k), abs=tolerance)


def test_a_greedy_answer_keeps_its_probability_at_temperature_one() -> None:
    assert served_logprob(np.array([-0.3]), np.array([[-0.3, -2.0]]), 0.0, 1.0, 0)[0] == -0.3


def test_settings_fall_back_to_the_models_own() -> None:
    assert settings({}, 0.7) == (0.7, 1.0, 0)
    assert settings({"temperature": 0, "top_k": -1, "top_p": 0.5}, 0.7) == (0.0, 0.5, 0)
