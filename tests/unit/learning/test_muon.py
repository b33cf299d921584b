"""Muon: orthogonal updates of a known size, and nothing for what it is not made for."""

import math

import pytest
import torch
from torch import nn

from adaptd.learning.muon import Muon, orthogonal


@pytest.mark.parametrize("shape", [(8, 32), (32, 8), (16, 16)])
def test_every_direction_comes_out_at_about_one(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    left, _, right = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    uneven = left @ torch.diag(torch.logspace(-1, 1, min(shape))) @ right
    values = torch.linalg.svdvals(orthogonal(uneven))
    assert values.min() > 0.5
    assert values.max() < 1.3


def test_an_update_has_the_size_that_is_usual_for_adamw() -> None:
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.zeros(24, 96))
    optimiser = Muon([parameter], lr=0.5)
    parameter.grad = torch.randn(24, 96)
    optimiser.step()
    assert float(parameter.detach().square().mean().sqrt()) == pytest.approx(0.5 * 0.2, rel=0.25)


def test_it_descends_on_an_ill_conditioned_problem() -> None:
    torch.manual_seed(0)
    scale = torch.logspace(-2, 0, 16)
    goal = torch.randn(16, 16)
    parameter = nn.Parameter(torch.zeros(16, 16))
    optimiser = Muon([parameter], lr=0.1)

    def loss() -> torch.Tensor:
        return ((parameter - goal) * scale).square().sum()

    before = loss().item()
    for _ in range(100):
        parameter.grad = None
        loss().backward()
        optimiser.step()
    assert loss().item() < 0.05 * before


def test_weight_decay_is_decoupled_and_a_parameter_without_gradient_stays() -> None:
    decayed, untouched = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4, 4))
    optimiser = Muon([decayed, untouched], lr=0.1, weight_decay=0.5)
    decayed.grad = torch.zeros(4, 4)
    optimiser.step()
    torch.testing.assert_close(decayed.detach(), torch.full((4, 4), 0.95))
    assert torch.equal(untouched.detach(), torch.ones(4, 4))


def test_a_vector_is_refused() -> None:
    with pytest.raises(ValueError, match=r"two-dimensional, got \(3,\)"):
        Muon([nn.Parameter(torch.zeros(3))], lr=0.1)
    assert math.isfinite(orthogonal(torch.zeros(4, 4)).sum()), "no gradient at all is no error"
