"""Draws of the tail: whom they come from, how often, and what they tell of a divergence."""

import pytest
import torch

from policies.divergence import draft_with_draws, draft_with_tail, forward_kl, tail_cross_entropy, with_tail
from policies.tail import draw_tail


def _target(rows: int = 1, vocab: int = 40, k: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    logprobs = (2 * torch.randn(rows, vocab, generator=generator)).log_softmax(-1)
    return logprobs, logprobs.topk(k, dim=-1).indices


def test_no_draw_is_among_the_kept_tokens_and_none_lacks_mass() -> None:
    logprobs, ids = _target(rows=200)
    logprobs[:, 7:15] = -torch.inf
    ids = logprobs.topk(4, dim=-1).indices
    drawn = draw_tail(logprobs, ids, 8, torch.rand(200, generator=torch.Generator().manual_seed(0)))
    assert drawn.shape == (200, 8)
    assert not (drawn[:, :, None] == ids[:, None]).any()
    assert bool(logprobs.gather(1, drawn).isfinite().all())


def test_tokens_come_in_proportion_to_their_share_of_the_tail() -> None:
    logprobs, ids = _target()
    n, offsets = 8, (torch.arange(4096) + 0.5) / 4096
    drawn = draw_tail(logprobs.expand(4096, -1), ids.expand(4096, -1), n, offsets)
    tail = logprobs.exp().scatter(1, ids, 0.0)[0]
    expected = tail / tail.sum()
    counts = torch.bincount(drawn.flatten(), minlength=40) / drawn.numel()
    torch.testing.assert_close(counts, expected, atol=2e-4, rtol=0)
    of_row = torch.zeros(4096, 40).scatter_add_(1, drawn, torch.ones(drawn.shape))
    assert bool((of_row >= (n * expected).floor() - 1e-3).all()), "systematic sampling: floor(n m) or ceil(n m) times"
    assert bool((of_row <= (n * expected).ceil() + 1e-3).all())


def test_shapes_in_front_of_the_vocabulary_are_kept() -> None:
    logprobs, ids = _target(rows=6)
    offset = torch.rand(6, generator=torch.Generator().manual_seed(1))
    flat = draw_tail(logprobs, ids, 3, offset)
    assert torch.equal(draw_tail(logprobs.view(2, 3, -1), ids.view(2, 3, -1), 3, offset.view(2, 3)), flat.view(2, 3, 3))


def test_bucket_and_draws_have_the_gradient_of_the_full_divergence_on_average() -> None:
    """KL(p || q) = KL over the K and the bucket + p(tail) KL within the tail, the last from 4,096 rows of draws."""
    logprobs, ids = _target(k=6)
    draft = torch.randn(1, 40, generator=torch.Generator().manual_seed(5), requires_grad=True)
    kl = forward_kl(logprobs, draft.log_softmax(-1)).sum()
    (whole,) = torch.autograd.grad(kl, draft)

    many, top = 4096, logprobs.gather(1, ids)
    drawn = draw_tail(logprobs.expand(many, -1), ids.expand(many, -1), 8, (torch.arange(many) + 0.5) / many)
    p, q = with_tail(top.expand(many, -1)), draft.expand(many, -1)
    joined, within = draft_with_draws(q, ids.expand(many, -1), drawn)
    beyond = tail_cross_entropy(p, within, torch.ones_like(drawn, dtype=torch.bool))
    (estimated,) = torch.autograd.grad((forward_kl(p, joined) + beyond).mean(), draft)
    torch.testing.assert_close(estimated, whole, atol=1e-4, rtol=0)

    (bucket,) = torch.autograd.grad(forward_kl(with_tail(top), draft_with_tail(draft, ids)).sum(), draft)
    assert (bucket - whole).abs().max() > 0.01, "what the bucket alone says differs, or the test shows nothing"


def test_gradient_is_what_automatic_differentiation_gives() -> None:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(3, 12, generator=generator, dtype=torch.float64, requires_grad=True)
    ids, drawn = torch.tensor([[0, 1], [3, 2], [5, 9]]), torch.tensor([[4, 4, 7], [8, 0, 11], [1, 2, 3]])
    assert torch.autograd.gradcheck(lambda z: draft_with_draws(z, ids, drawn), (logits,))


def test_padding_counts_for_nothing() -> None:
    p = with_tail(torch.tensor([[0.5, 0.2], [0.5, 0.2]]).log())
    within = torch.tensor([[-1.0, -3.0], [-1.0, -torch.inf]])
    known = torch.tensor([[True, False], [False, False]])
    torch.testing.assert_close(tail_cross_entropy(p, within, known), torch.tensor([0.3, 0.0]))
    torch.testing.assert_close(tail_cross_entropy(p, within, ~known), torch.tensor([0.9, 0.3]))


def test_rows_must_fit() -> None:
    with pytest.raises(ValueError, match=r"drawn \(2 rows\)"):
        draft_with_draws(torch.zeros(3, 8), torch.zeros(3, 2, dtype=torch.long), torch.zeros(2, 2, dtype=torch.long))
