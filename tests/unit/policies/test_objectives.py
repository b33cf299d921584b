"""The learner's objectives by name."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch

from adaptd.config import LearnConfig
from policies import divergence
from policies.objectives import OBJECTIVES, compute_objective, get_objective


def inputs() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    target, draft = torch.randn(6, 9, generator=generator), torch.randn(6, 9, generator=generator)
    top = target.log_softmax(-1).topk(3)
    return {
        "p": divergence.with_tail(top.values),
        "q": divergence.draft_with_tail(draft, top.indices),
        "draft_logits": draft,
        "token_ids": target.argmax(-1),
        "lengths": [4, 2],
        "k": 3,
    }


def test_the_names_are_those_that_a_configuration_may_use() -> None:
    assert set(OBJECTIVES) == set(get_args(LearnConfig.model_fields["objective"].annotation))
    assert len(OBJECTIVES) == 8
    assert all(objective.name == name for name, objective in OBJECTIVES.items())


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_every_objective_gives_one_finite_loss_per_position_and_a_gradient(name: str) -> None:
    given = inputs()
    draft = given["draft_logits"].clone().requires_grad_()
    ids = given["token_ids"][:, None].expand(6, 1)
    p = divergence.with_tail(torch.full((6, 1), -0.5))
    loss = compute_objective(
        name,
        p=p,
        q=divergence.draft_with_tail(draft, ids),
        draft_logits=draft,
        token_ids=given["token_ids"],
        lengths=given["lengths"],
        k=given["k"],
    )
    assert loss.shape == (6,)
    loss.sum().backward()
    assert draft.grad is not None
    assert draft.grad.isfinite().all()
    assert draft.grad.abs().sum() > 0


def test_no_two_objectives_are_the_same_function() -> None:
    """A registry line copied and half edited would train with another loss than the configuration says."""
    given = inputs()
    losses = {name: compute_objective(name, **given).sum().item() for name in OBJECTIVES}
    assert len({round(loss, 6) for loss in losses.values()}) == len(OBJECTIVES)
    assert losses["forward_kl"] == pytest.approx(divergence.forward_kl(given["p"], given["q"]).sum().item())


def test_options_reach_the_formula() -> None:
    given = inputs()
    plain = compute_objective("forward_kl", **given)
    torch.testing.assert_close(compute_objective("kl_tv", **given, options={"tv_weight": 0.0}), plain)


def test_hard_labels_need_no_target_probabilities() -> None:
    given = inputs()
    loss = compute_objective(
        "cross_entropy", p=None, q=None, draft_logits=given["draft_logits"], token_ids=given["token_ids"]
    )
    assert loss.shape == (6,)


def test_an_unknown_name_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"'foward_kl'.*did you mean 'forward_kl'"):
        get_objective("foward_kl")


def test_an_unknown_option_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'tv_wieght'.*known: tv_weight"):
        compute_objective("kl_tv", **inputs(), options={"tv_wieght": 1.0})


@pytest.mark.parametrize(("name", "missing"), [("forward_kl", "p and q"), ("cross_entropy", "draft_logits")])
def test_a_missing_input_is_named(name: str, missing: str) -> None:
    with pytest.raises(ValueError, match=missing):
        compute_objective(name, p=None, q=None, draft_logits=None, token_ids=None)


@pytest.mark.parametrize("missing", ["lengths", "k"])
def test_an_objective_over_blocks_needs_to_know_where_they_begin_and_end(missing: str) -> None:
    with pytest.raises(ValueError, match="'acceptance_length' needs lengths and k"):
        compute_objective("acceptance_length", **inputs() | {missing: None})


def test_lengths_and_k_reach_the_formula() -> None:
    given = inputs()
    whole, cut = (compute_objective("acceptance_length", **given | {"lengths": n}) for n in ([6], [4, 2]))
    assert torch.equal(whole[:2], cut[:2])
    assert (whole[2:4] < cut[2:4]).all(), "a block that may go on is worth more"
    short = compute_objective("acceptance_length", **given | {"k": 1})
    torch.testing.assert_close(short, -divergence.overlap(given["p"], given["q"]))
