"""The served distribution and draws from it."""

import numpy as np
import pytest
import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from adaptd.decoding.request import DecodeRequest, SamplingParams
from adaptd.decoding.sampling import RowParams, choose, inverse_cdf, warp

CPU = torch.device("cpu")


def reference(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """transformers' own warpers, in its order."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
    if params.top_k:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1.0:
        warpers.append(TopPLogitsWarper(params.top_p))
    return warpers(torch.zeros(1, 1, dtype=torch.long), logits).softmax(-1)


def test_each_row_is_warped_by_its_own_parameters_as_transformers_would() -> None:
    rows = [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.7, top_p=0.8),
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=1.3, top_k=5),
        SamplingParams(temperature=0.5, top_k=20, top_p=0.5),
        SamplingParams(temperature=1.0, top_p=1e-6),
        SamplingParams(temperature=1.0, top_k=1000),
    ]
    logits = torch.randn(len(rows), 4, 50, generator=torch.Generator().manual_seed(0)) * 3
    probs = warp(logits, RowParams.build(rows, 50, CPU))
    for row, params in enumerate(rows):
        if not params.greedy:
            torch.testing.assert_close(probs[row], reference(logits[row], params), atol=1e-6, rtol=1e-5)


def test_two_dimensional_logits_are_warped_like_one_position_of_three() -> None:
    rows = [SamplingParams(temperature=0.9, top_p=0.7), SamplingParams(temperature=1.1)]
    logits = torch.randn(2, 30, generator=torch.Generator().manual_seed(1))
    params = RowParams.build(rows, 30, CPU)
    assert torch.equal(warp(logits, params), warp(logits[:, None], params)[:, 0])


def test_tokens_tied_with_the_last_one_kept_are_kept_too() -> None:
    logits = torch.tensor([[2.0, 1.0, 1.0, 0.0]])
    probs = warp(logits, RowParams.build([SamplingParams(top_k=2)], 4, CPU))
    assert probs[0, 1] == probs[0, 2] > 0
    assert probs[0, 3] == 0


def test_inverse_cdf_follows_the_weights_and_never_draws_a_zero() -> None:
    weights = torch.tensor([0.0, 3.0, 0.0, 1.0, 0.0])
    uniforms = torch.rand(40_000, generator=torch.Generator().manual_seed(2))
    uniforms[:2] = torch.tensor([0.0, 1.0 - 2.0**-24])
    drawn = inverse_cdf(weights.expand(40_000, 5).contiguous(), uniforms)
    counts = np.bincount(drawn.numpy(), minlength=5)
    assert counts[[0, 2, 4]].sum() == 0
    assert counts[1] / 40_000 == pytest.approx(0.75, abs=0.01)


def test_the_lowest_temperature_is_a_distribution_on_the_most_likely_tokens() -> None:
    logits = torch.tensor([[80.0, 79.9, 80.0, -torch.inf], [-3e4, -2e4, -4e4, -5e4]])
    probs = warp(logits, RowParams.build([SamplingParams(temperature=1e-6)] * 2, 4, CPU))
    torch.testing.assert_close(probs, torch.tensor([[0.5, 0.0, 0.5, 0.0], [0.0, 1.0, 0.0, 0.0]]))


def test_greedy_rows_take_the_most_likely_token_whatever_the_uniform() -> None:
    logits = torch.tensor([[0.0, 5.0, 1.0], [0.0, 5.0, 1.0]])
    mixed = RowParams.build([SamplingParams(temperature=0.0), SamplingParams(temperature=1.0)], 3, CPU)
    tokens, q = choose(logits, mixed, torch.tensor([0.0, 0.0]))
    assert tokens.tolist() == [1, 0]
    assert q is not None
    greedy = RowParams.build([SamplingParams(temperature=0.0)] * 2, 3, CPU)
    tokens, q = choose(logits, greedy, torch.zeros(2))
    assert tokens.tolist() == [1, 1]
    assert q is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 1e-9),
        ("temperature", float("inf")),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("max_tokens", 0),
        ("stop", ("",)),
    ],
)
def test_a_parameter_out_of_range_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        SamplingParams(**{field: value})


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="prompt_ids is empty"):
        DecodeRequest("r", [], SamplingParams())
