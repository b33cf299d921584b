"""The shortcut behind every comparison: one teacher-forced pass says what real decoding would have cost."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from adaptd.decoding.request import Finished
from adaptd.learning.evaluate import profiles
from policies.acceptance import mal

K = 3
Decode = Callable[..., list[Finished]]


def test_greedy_shortcut_counts_exactly_the_rounds_of_real_decoding(draft: torch.nn.Module, decode: Decode) -> None:
    done = decode(draft, 40, temperature=0.0)
    expected = profiles(draft, [f.trace for f in done if f.trace], K, max_tokens=256)
    assert [p.rounds for p in expected] == [f.stats.rounds for f in done]
    assert [p.accepted for p in expected] == [f.stats.accepted for f in done]
    assert 1.2 < mal(expected) < K + 1, "the draft must be right now and then, or the test compares nothing"


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_sampled_shortcut_has_the_mean_of_real_decoding(
    draft: torch.nn.Module, decode: Decode, temperature: float
) -> None:
    """Rounds are random given the text: the difference to their expectation must be noise (|z| < 3, p = 0.003)."""
    done = decode(draft, 300, temperature=temperature)
    expected = np.array([p.rounds for p in profiles(draft, [f.trace for f in done if f.trace], K, max_tokens=256)])
    real = np.array([f.stats.rounds for f in done], float)
    difference = real - expected
    z = difference.mean() / (difference.std(ddof=1) / np.sqrt(len(difference)))
    assert abs(z) < 3.0, (z, real.mean(), expected.mean())
    assert difference.std() > 0.1, "rounds must be random, or the test is the greedy one"


def test_another_draft_is_scored_on_the_same_text_as_if_it_had_served(
    target: torch.nn.Module, draft: torch.nn.Module, decode: Decode
) -> None:
    """A draft that equals the target is always right: R tokens cost ceil(R / (k + 1)) rounds."""
    done = decode(draft, 10, temperature=0.0)
    traces = [f.trace for f in done if f.trace]
    assert [p.rounds for p in profiles(target, traces, K, max_tokens=256)] == [
        -(-t.response_len // (K + 1)) for t in traces
    ]


def test_order_and_batching_do_not_change_the_scores(draft: torch.nn.Module, decode: Decode) -> None:
    traces = [f.trace for f in decode(draft, 9, temperature=1.0) if f.trace]
    one = [p.rounds for p in profiles(draft, traces, K, max_tokens=256, batch_traces=1)]
    many = [p.rounds for p in profiles(draft, traces[::-1], K, max_tokens=256, batch_traces=9)][::-1]
    assert one == pytest.approx(many, rel=1e-4)
