"""Divergences against five-line references in float64, at tail mass 0, at -inf, and by their properties."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from policies import divergence

VOCAB = 12
K = 4
DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "forward_kl": divergence.forward_kl,
    "reverse_kl": divergence.reverse_kl,
    "jensen_shannon": divergence.jensen_shannon,
    "total_variation": divergence.total_variation,
    "kl_tv": divergence.kl_tv,
    "entropy_adaptive": divergence.entropy_adaptive,
}
every_divergence = pytest.mark.parametrize("function", DIVERGENCES.values(), ids=DIVERGENCES.keys())


def random_logits(rows: int, seed: int, scale: float = 2.0, vocab: int = VOCAB) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(rows, vocab, generator=generator, dtype=torch.float64)


def captured(logits: Tensor, k: int = K) -> tuple[Tensor, Tensor]:
    """What capture keeps of a target: ids and log-probabilities of its k most likely tokens."""
    top = logits.log_softmax(-1).topk(k, dim=-1)
    return top.indices, top.values


def pair(seed: int, rows: int = 50) -> tuple[Tensor, Tensor]:
    target, draft = random_logits(rows, seed), random_logits(rows, seed + 1000)
    ids, logprobs = captured(target)
    return divergence.with_tail(logprobs), divergence.draft_with_tail(draft, ids)


def test_with_tail_adds_exactly_the_mass_of_all_other_tokens() -> None:
    target = random_logits(50, seed=0)
    ids, logprobs = captured(target)
    probabilities = target.softmax(-1)
    left_over = 1.0 - probabilities.gather(-1, ids).sum(-1)
    result = divergence.with_tail(logprobs)
    assert result.shape == (50, K + 1)
    torch.testing.assert_close(result[:, :K], logprobs)
    torch.testing.assert_close(result[:, K].exp(), left_over)


def test_a_tail_without_mass_is_finite_and_close_to_the_floor() -> None:
    result = divergence.with_tail(torch.tensor([[0.7, 0.3], [1.0, 0.0]], dtype=torch.float64).log())
    torch.testing.assert_close(result[:, -1], torch.full((2,), math.log(divergence.TAIL_FLOOR), dtype=torch.float64))
    assert result[1, 1] == -torch.inf


def test_half_precision_that_sums_above_one_still_gives_a_distribution_and_no_negative_divergence() -> None:
    """float16 rounding can make the top-K sum 1.0003; unnormalised, KL of two equal rows would come out below zero."""
    logprobs = torch.tensor([[0.5003, 0.4999, 1e-4]]).log().half()
    assert logprobs.float().exp().sum() > 1.0
    p = divergence.with_tail(logprobs)
    assert p.dtype == torch.float32
    torch.testing.assert_close(p.exp().sum(-1), torch.ones(1))
    q = divergence.draft_with_tail(random_logits(1, seed=3).float(), torch.tensor([[2, 5, 7]]))
    for function in DIVERGENCES.values():
        assert function(p, q).item() > 0.0
        assert function(p, p).item() == pytest.approx(0.0, abs=1e-6)


def test_draft_with_tail_is_the_full_softmax_at_the_ids_and_the_rest_summed() -> None:
    draft = random_logits(50, seed=1)
    ids, _ = captured(random_logits(50, seed=2))
    probabilities = draft.softmax(-1)
    kept = probabilities.gather(-1, ids)
    expected = torch.cat([kept, 1.0 - kept.sum(-1, keepdim=True)], -1)
    torch.testing.assert_close(divergence.draft_with_tail(draft, ids).exp(), expected)


def test_draft_with_tail_ignores_a_constant_added_to_the_logits() -> None:
    draft = random_logits(5, seed=1)
    ids, _ = captured(draft)
    torch.testing.assert_close(divergence.draft_with_tail(draft + 300.0, ids), divergence.draft_with_tail(draft, ids))


@pytest.mark.parametrize("case", ["all ids kept", "all others at -inf"])
def test_a_draft_without_other_tokens_has_the_floor_as_tail_and_finite_gradients(case: str) -> None:
    """The log-sum-exp of nothing is -inf and its gradient NaN, which would poison the whole batch."""
    if case == "all ids kept":
        draft, ids = torch.zeros(2, 3), torch.arange(3).repeat(2, 1)
    else:
        draft = torch.tensor([[1.0, 2.0, -torch.inf, -torch.inf], [1.0, 0.0, 0.0, 0.0]])
        ids = torch.tensor([[0, 1], [0, 1]])
    draft.requires_grad_()
    q = divergence.draft_with_tail(draft, ids)
    assert q[0, -1].item() == pytest.approx(math.log(divergence.TAIL_FLOOR))
    p = divergence.with_tail(torch.tensor([[0.5, 0.4, 0.05][: ids.shape[1]]] * 2).log())
    divergence.forward_kl(p, q).sum().backward()
    assert draft.grad is not None
    assert draft.grad.isfinite().all()


def test_a_draft_that_leaves_the_tail_almost_nothing_is_pushed_to_give_it_mass() -> None:
    """`log(clamp(1 - sum))` has no gradient there: the worst mistake would be the one that is never corrected."""
    draft = torch.zeros(1, VOCAB)
    draft[0, :2] = 40.0
    draft.requires_grad_()
    p = divergence.with_tail(torch.tensor([[0.45, 0.45]]).log())
    divergence.forward_kl(p, divergence.draft_with_tail(draft, torch.tensor([[0, 1]]))).sum().backward()
    assert draft.grad is not None
    assert (draft.grad[0, 2:] < 0).all()
    assert draft.grad[0, 2:].sum().item() == pytest.approx(-0.1, rel=1e-3)


def test_each_divergence_equals_its_formula() -> None:
    p, q = pair(seed=0)
    P, Q = p.exp(), q.exp()  # the symbols of the formulas
    M = 0.3 * P + 0.7 * Q
    forward = (P * (P / Q).log()).sum(-1)
    reverse = (Q * (Q / P).log()).sum(-1)
    jsd = 0.3 * (P * (P / M).log()).sum(-1) + 0.7 * (Q * (Q / M).log()).sum(-1)
    tv = 0.5 * (P - Q).abs().sum(-1)
    torch.testing.assert_close(divergence.forward_kl(p, q), forward)
    torch.testing.assert_close(divergence.reverse_kl(p, q), reverse)
    torch.testing.assert_close(divergence.jensen_shannon(p, q, beta=0.3), jsd)
    torch.testing.assert_close(divergence.total_variation(p, q), tv)
    torch.testing.assert_close(divergence.kl_tv(p, q, tv_weight=0.5), forward + 0.5 * tv)
    torch.testing.assert_close(divergence.entropy(p), -(P * P.log()).sum(-1))


def test_hand_computed_values_in_nats() -> None:
    p, q = torch.tensor([[0.5, 0.25, 0.25]]).log(), torch.tensor([[0.25, 0.25, 0.5]]).log()
    assert divergence.forward_kl(p, q).item() == pytest.approx(0.25 * math.log(2))
    assert divergence.total_variation(p, q).item() == pytest.approx(0.25)
    assert divergence.entropy(p).item() == pytest.approx(1.5 * math.log(2))


def test_one_minus_total_variation_is_the_overlap() -> None:
    p, q = pair(seed=4)
    torch.testing.assert_close(1.0 - divergence.total_variation(p, q), torch.minimum(p.exp(), q.exp()).sum(-1))


@every_divergence
@given(seed=st.integers(0, 10_000))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_is_not_negative_and_zero_only_between_equals(function: Callable[[Tensor, Tensor], Tensor], seed: int) -> None:
    p, q = pair(seed, rows=8)
    assert (function(p, q) > 1e-6).all()
    torch.testing.assert_close(function(p, p), torch.zeros(8, dtype=torch.float64))


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jensen_shannon", "total_variation"])
def test_the_bucketed_divergence_is_a_lower_bound_of_the_full_one(name: str) -> None:
    target, draft = random_logits(200, seed=5), random_logits(200, seed=6)
    ids, logprobs = captured(target)
    bucketed = DIVERGENCES[name](divergence.with_tail(logprobs), divergence.draft_with_tail(draft, ids))
    full = DIVERGENCES[name](target.log_softmax(-1), draft.log_softmax(-1))
    assert (bucketed <= full + 1e-9).all()
    assert (bucketed < full - 1e-3).any()


def test_an_outcome_without_mass_adds_nothing_and_a_missing_one_makes_kl_infinite() -> None:
    narrow = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64).log()
    wide = torch.tensor([[0.25, 0.25, 0.5]], dtype=torch.float64).log()
    assert divergence.forward_kl(narrow, wide).item() == pytest.approx(math.log(2))
    assert divergence.reverse_kl(wide, narrow).item() == pytest.approx(math.log(2))
    assert divergence.forward_kl(wide, narrow).item() == math.inf
    assert divergence.reverse_kl(narrow, wide).item() == math.inf
    assert divergence.entropy(narrow).item() == pytest.approx(math.log(2))
    assert divergence.total_variation(wide, narrow).item() == pytest.approx(0.5)
    both = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64).log()
    for function in DIVERGENCES.values():
        assert function(both, both).item() == 0.0


def test_jensen_shannon_stays_within_zero_and_ln_2_and_is_symmetric_at_one_half() -> None:
    p, q = pair(seed=7)
    jsd = divergence.jensen_shannon(p, q)
    assert (jsd <= math.log(2)).all()
    torch.testing.assert_close(jsd, divergence.jensen_shannon(q, p))
    apart = torch.tensor([[1.0, 0.0]]).log(), torch.tensor([[0.0, 1.0]]).log()
    assert divergence.jensen_shannon(*apart).item() == pytest.approx(math.log(2))


@every_divergence
def test_gradients_equal_finite_differences(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    ids, logprobs = captured(random_logits(3, seed=8))
    p = divergence.with_tail(logprobs)
    draft = random_logits(3, seed=9).requires_grad_()
    assert torch.autograd.gradcheck(lambda logits: function(p, divergence.draft_with_tail(logits, ids)), (draft,))


@every_divergence
def test_gradients_are_finite_with_padding_in_both(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    """`where` hides a NaN from the value but not from the gradient, unless its input is replaced first."""
    p = torch.tensor([[0.6, 0.4, 0.0]]).log()
    logits = torch.tensor([[0.3, -0.2, -torch.inf]], requires_grad=True)
    loss = function(p, logits.log_softmax(-1)).sum()
    loss.backward()
    assert loss.isfinite()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert logits.grad[0, 0] != 0.0


def test_entropy_adaptive_is_kl_and_tv_for_a_sure_target_and_kl_for_an_unsure_one() -> None:
    sure, unsure = torch.tensor([[40.0, 0.0, 0.0]]).log_softmax(-1), torch.zeros(1, 3).log_softmax(-1)
    q = torch.tensor([[0.5, 0.3, 0.2]]).log()
    at = {"midpoint": 0.5, "width": 0.02, "tv_weight": 3.0}
    low, high = divergence.entropy_adaptive(sure, q, **at), divergence.entropy_adaptive(unsure, q, **at)
    torch.testing.assert_close(low, divergence.kl_tv(sure, q, tv_weight=3.0))
    torch.testing.assert_close(high, divergence.forward_kl(unsure, q))


def test_entropy_adaptive_moves_smoothly_and_only_towards_kl_as_the_target_gets_less_sure() -> None:
    """The weight is solved from the value; a step or a plateau in it would make the loss jump between two tokens."""
    # From one-hot to uniform: entropy rises along the path.
    sharpness = torch.linspace(6.0, 0.0, 400, dtype=torch.float64)[:, None]
    p = (sharpness * torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)).log_softmax(-1)
    q = torch.tensor([[0.2, 0.5, 0.1, 0.1, 0.1]], dtype=torch.float64).log().expand_as(p)
    found = divergence.entropy_adaptive(p, q, midpoint=1.0, width=0.25)
    weight = (found - divergence.forward_kl(p, q)) / divergence.total_variation(p, q)
    assert (weight.diff() < 0).all()
    assert weight.diff().min() > -0.02
    torch.testing.assert_close(weight, torch.sigmoid((1.0 - divergence.entropy(p)) / 0.25))


def test_cross_entropy_is_minus_the_log_probability_of_the_token() -> None:
    draft = random_logits(5, seed=10)
    tokens = torch.tensor([0, 3, 11, 2, 2], dtype=torch.int32)
    expected = -draft.log_softmax(-1)[torch.arange(5), tokens.long()]
    torch.testing.assert_close(divergence.cross_entropy(draft, tokens), expected)


def test_acceptance_length_loss_is_minus_the_expected_accepted_prefix() -> None:
    accept = torch.tensor([[0.5, 0.5, 0.5], [1.0, 1.0, 1.0], [0.0, 1.0, 1.0]], requires_grad=True)
    loss = divergence.acceptance_length_loss(accept)
    torch.testing.assert_close(loss, torch.tensor([-0.875, -3.0, 0.0]))
    loss.sum().backward()
    # With the first proposal rejected for sure, only the first can gain anything: it would unlock all three.
    assert accept.grad is not None
    torch.testing.assert_close(accept.grad[2], torch.tensor([-3.0, 0.0, 0.0]))


def test_overlap_is_what_total_variation_leaves() -> None:
    p, q = pair(seed=3)
    torch.testing.assert_close(divergence.overlap(p, q), 1.0 - divergence.total_variation(p, q))
    torch.testing.assert_close(divergence.overlap(p, p), torch.ones(len(p), dtype=p.dtype))
    apart = torch.tensor([[0.0, -torch.inf], [-torch.inf, 0.0]])
    assert divergence.overlap(apart, apart.flip(0)).tolist() == [0.0, 0.0]


def by_enumeration(beta: list[float], start: int, k: int) -> float:
    """Expected accepted tokens of a block: over every outcome of its proposals, probability times accepted prefix."""
    block = beta[start : start + k]
    expected = 0.0
    for outcome in itertools.product([True, False], repeat=len(block)):
        probability = math.prod(b if accepted else 1 - b for b, accepted in zip(block, outcome, strict=True))
        expected += probability * len(list(itertools.takewhile(bool, outcome)))
    return expected


@pytest.mark.parametrize("k", [1, 2, 3, 7])
def test_acceptance_length_is_the_expectation_over_every_outcome_of_each_block(k: int) -> None:
    """Five positions of a sequence of three and one of two: a block does not reach into the next sequence."""
    p, q = pair(seed=7, rows=5)
    beta = divergence.overlap(p, q).tolist()
    assert min(beta) > 0.05, "or blocks end before they could cross"
    expected = [-by_enumeration(beta[:3], t, k) for t in range(3)] + [-by_enumeration(beta[3:], t, k) for t in range(2)]
    loss = divergence.acceptance_length(p, q, [3, 0, 2], k)
    torch.testing.assert_close(loss, torch.tensor(expected, dtype=torch.float64))
    if k > 1:
        joined = divergence.acceptance_length(p, q, [5], k)
        assert joined[2] < loss[2], "the end of a sequence must matter, or the test proves nothing"


def test_acceptance_length_has_the_gradient_of_its_values() -> None:
    target, draft = random_logits(6, seed=1), random_logits(6, seed=2).requires_grad_()
    ids, logprobs = captured(target)
    p = divergence.with_tail(logprobs)

    def loss(logits: Tensor) -> Tensor:
        return divergence.acceptance_length(p, divergence.draft_with_tail(logits, ids), [4, 2], k=3)

    assert torch.autograd.gradcheck(loss, (draft,))
    (gradient,) = torch.autograd.grad(loss(draft)[:4].sum(), draft)
    assert gradient[:4].abs().sum(-1).min() > 0
    assert gradient[4:].abs().sum() == 0, "another sequence"


def test_acceptance_length_at_certain_outcomes_has_finite_gradients() -> None:
    """A proposal that is accepted or rejected for sure is a product with a 1 or a 0: no NaN may come out of either."""
    sure = torch.tensor([[0.0, -torch.inf], [0.0, -torch.inf], [-torch.inf, 0.0], [0.0, -torch.inf]])
    q = torch.tensor([[0.0, -50.0], [-50.0, 0.0], [-50.0, 0.0], [0.0, -50.0]]).requires_grad_()
    loss = divergence.acceptance_length(sure, q, [4], k=3)
    torch.testing.assert_close(loss, torch.tensor([-1.0, 0.0, -2.0, -1.0]))
    loss.sum().backward()
    assert q.grad is not None
    assert q.grad.isfinite().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: divergence.acceptance_length(torch.zeros(5, 2), torch.zeros(5, 2), [2, 2], 3),
            r"lengths \(sum 4\).*5 positions.*capture all",
        ),
        (lambda: divergence.acceptance_length(torch.zeros(1, 2), torch.zeros(1, 2), [2, -1], 3), "at least 0"),
        (lambda: divergence.acceptance_length(torch.zeros(1, 2), torch.zeros(1, 2), [1], 0), r"k \(0\)"),
        (lambda: divergence.overlap(torch.zeros(2, 3), torch.zeros(2, 4)), r"\(2, 3\) and q \(2, 4\)"),
        (lambda: divergence.forward_kl(torch.zeros(2, 3), torch.zeros(2, 4)), r"\(2, 3\) and q \(2, 4\)"),
        (lambda: divergence.with_tail(torch.zeros(3)), "two-dimensional"),
        (lambda: divergence.draft_with_tail(torch.zeros(2, 3), torch.zeros(1, 2).long()), r"ids \(1 rows\)"),
        (lambda: divergence.jensen_shannon(torch.zeros(1, 2), torch.zeros(1, 2), beta=1.0), r"beta \(1.0\)"),
        (lambda: divergence.entropy_adaptive(torch.zeros(1, 2), torch.zeros(1, 2), width=0.0), r"width \(0.0\)"),
        (lambda: divergence.entropy_adaptive(torch.zeros(1, 2), torch.zeros(1, 2), tv_weight=-1.0), r"tv_weight \(-1"),
        (lambda: divergence.kl_tv(torch.zeros(1, 2), torch.zeros(1, 2), tv_weight=-1.0), r"tv_weight \(-1.0\)"),
        (lambda: divergence.cross_entropy(torch.zeros(2, 3), torch.zeros(3).long()), r"token_ids \(3,\)"),
    ],
)
def test_a_wrong_argument_is_named_with_its_value(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
