"""The served distribution against transformers' own processors."""

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from policies.warp import served_probs, truncate


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(0.7, 0, 1.0), (1.0, 5, 1.0), (1.3, 0, 0.8), (0.8, 20, 0.6)]
)
def test_it_is_what_transformers_would_draw_from(temperature: float, top_k: int, top_p: float) -> None:
    logits = 4 * torch.randn(50, 200, generator=torch.Generator().manual_seed(0))
    expected = TemperatureLogitsWarper(temperature)(None, logits)  # type: ignore[arg-type]
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)  # type: ignore[arg-type]
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)  # type: ignore[arg-type]
    assert torch.allclose(served_probs(logits, temperature, top_k, top_p), expected.softmax(-1), atol=1e-6)


def test_a_row_without_limits_keeps_every_token_beside_one_with_limits() -> None:
    """Rounding in the cumulative sum must not cost the neighbour its tail."""
    probs = (6 * torch.randn(2, 5000, generator=torch.Generator().manual_seed(0))).softmax(-1)
    kept = truncate(probs, torch.tensor([5000, 5000]), torch.tensor([2.0, 0.5]))
    assert torch.allclose(kept[0], probs[0], atol=1e-7)
    assert (kept[0] > 0).sum() == (probs[0] > 0).sum()
    assert (kept[1] > 0).sum() < 100


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_greedy_has_no_distribution(temperature: float) -> None:
    with pytest.raises(ValueError, match="must be above 0"):
        served_probs(torch.zeros(1, 4), temperature)
