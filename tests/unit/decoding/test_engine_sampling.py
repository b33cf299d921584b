"""Sampling with the whole engine follows the target exactly. Statistical tests at fixed seeds, p > 0.01."""

from collections.abc import Iterable

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from adaptd.decoding.capture import CaptureConfig
from adaptd.decoding.engine import SpeculativeDecoder
from adaptd.decoding.request import DecodeRequest, Finished, SamplingParams
from adaptd.decoding.sampling import RowParams, warp
from policies.recall import Recall
from tests.unit.decoding.tiny import disturb, make_draft, make_model, make_prompts, serve

VOCAB, DRAWS = 8, 20_480
PROMPT = [1, 6, 3, 3, 0]


def exact_pairs(target: torch.nn.Module, params: SamplingParams) -> np.ndarray:
    """Probability of each pair of first two tokens, [V, V], by enumeration."""
    rows = RowParams.build([params], VOCAB, torch.device("cpu"))
    with torch.no_grad():
        first = warp(target(torch.tensor([PROMPT])).logits[:, -1], rows)[0].double()
        after = target(torch.tensor([[*PROMPT, token] for token in range(VOCAB)])).logits[:, -1]
    second = torch.cat([warp(row[None], rows) for row in after]).double()
    return (first[:, None] * second).numpy()


def assert_distributed(answers: Iterable[Finished], expected: np.ndarray, draws: int) -> int:
    """That pairs of tokens come as often as `expected` [V, V] says (chi-squared); how many cells were compared."""
    counts = np.zeros_like(expected)
    for finished in answers:
        counts[finished.token_ids] += 1
    assert counts[expected == 0].sum() == 0
    likely = expected * draws >= 5
    observed = np.append(counts[likely], counts[~likely].sum())
    wanted = np.append(expected[likely], expected[~likely].sum()) * draws
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    assert chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue > 0.01
    return len(observed)


@pytest.mark.parametrize(
    ("k", "params", "recalls"),
    [
        (1, SamplingParams(temperature=1.0, max_tokens=2), False),
        pytest.param(
            3, SamplingParams(temperature=0.8, top_p=0.9, top_k=6, max_tokens=2), False, marks=pytest.mark.slow
        ),
        pytest.param(1, SamplingParams(temperature=1.0, max_tokens=2), True, marks=pytest.mark.slow),
        (3, SamplingParams(temperature=0.8, top_p=0.9, top_k=6, max_tokens=2), True),
    ],
    ids=["plain", "warped", "plain with recall", "warped with recall"],
)
def test_the_first_two_tokens_have_the_exact_joint_distribution_with_swaps_in_between(
    k: int, params: SamplingParams, recalls: bool
) -> None:
    """k = 1 spreads the two tokens over rounds, k = 3 puts them into one."""
    target = make_model(vocab=VOCAB)
    draft = make_draft(target, noise=0.06)
    # Few candidates are kept, so that what is recalled is wrong, too.
    recall = Recall(orders=(1, 2), echo=(1,), entries=64, width=3, seeded=True) if recalls else None
    capture = CaptureConfig(k_top=3) if recalls else None
    engine = SpeculativeDecoder(target, draft, k=k, max_batch=1024, max_length=16, capture=capture, recall=recall)
    requests = [
        DecodeRequest(str(seed), PROMPT, SamplingParams(**{**_fields(params), "seed": seed})) for seed in range(DRAWS)
    ]

    def swap(round_: int) -> None:
        """To and fro between two drafts."""
        if round_ % 5 == 0:
            disturb(draft, 0.05 if round_ % 10 == 0 else -0.05, seed=3)

    done = serve(engine, requests, swap)
    accepted = sum(finished.stats.accepted for finished in done.values())
    judged = sum(sum(finished.stats.reached_at) for finished in done.values())
    assert 0.2 < accepted / judged < 0.95, "the test needs rejections and acceptances"
    if recall is not None:
        found = recall.look(torch.tensor([PROMPT]), torch.tensor([len(PROMPT)]))
        assert found.weights.amax() > 0, "the test needs proposals with something recalled in them"

    assert assert_distributed(done.values(), exact_pairs(target, params), DRAWS) > 15


def _fields(params: SamplingParams) -> dict[str, object]:
    return {name: getattr(params, name) for name in params.__slots__}


PARAMS = [
    SamplingParams(temperature=0.0, max_tokens=14),
    SamplingParams(temperature=1.0, max_tokens=22, seed=5),
    SamplingParams(temperature=0.7, top_p=0.9, max_tokens=9, seed=6),
    SamplingParams(temperature=1.1, top_k=12, max_tokens=17, seed=7),
]


def test_what_shares_the_batch_does_not_change_a_requests_output() -> None:
    """At a fixed seed a request decodes alone as it does in a full batch, greedy and sampled rows mixed."""
    target = make_model(vocab=97)
    draft = make_draft(target, noise=0.05)
    requests = [
        DecodeRequest(str(at), prompt, PARAMS[at % len(PARAMS)]) for at, prompt in enumerate(make_prompts(18, 97))
    ]

    def outputs(batch: int, capture: CaptureConfig | None) -> dict[str, tuple[int, ...]]:
        engine = SpeculativeDecoder(target, draft, k=3, max_batch=batch, max_length=100, capture=capture)
        return {name: finished.token_ids for name, finished in serve(engine, requests).items()}

    alone = outputs(1, None)
    assert outputs(7, CaptureConfig(k_top=4)) == alone
    assert outputs(18, None) == alone


def test_a_seed_repeats_a_request_whatever_is_remembered_unless_asked_otherwise() -> None:
    target = make_model(vocab=97)
    request = DecodeRequest("a", [1, 2, 3], SamplingParams(temperature=1.0, max_tokens=40, seed=1))
    others = [
        DecodeRequest(str(i), [1, 2, 3], SamplingParams(temperature=1.0, max_tokens=40, seed=i)) for i in range(24)
    ]

    def twice(seeded: bool) -> list[tuple[int, ...]]:
        recall = Recall(orders=(1, 2), entries=4096, width=8, seeded=seeded)
        capture = CaptureConfig(k_top=8)
        engine = SpeculativeDecoder(
            target, make_draft(target), k=3, max_batch=4, max_length=100, capture=capture, recall=recall
        )
        first = serve(engine, [request])["a"].token_ids
        serve(engine, others)
        assert engine.recalled > 50
        return [first, serve(engine, [request])["a"].token_ids]

    first, again = twice(seeded=False)
    assert first == again
    first, again = twice(seeded=True)
    assert first != again, "what is remembered must matter, or the test proves nothing"


def test_a_seed_repeats_a_request_and_another_seed_does_not() -> None:
    target = make_model(vocab=97)
    engine = SpeculativeDecoder(target, make_draft(target), k=3, max_batch=4, max_length=100)
    requests = [
        DecodeRequest(name, [1, 2, 3], SamplingParams(temperature=1.0, max_tokens=30, seed=seed))
        for name, seed in (("a", 1), ("b", 1), ("c", -(2**70) - 5), ("d", None))
    ]
    done = serve(engine, requests)
    assert done["a"].token_ids == done["b"].token_ids
    assert len({done[name].token_ids for name in "acd"}) == 3
