"""What compiled code says of a recall is what the recall says itself."""

import pytest
import torch

from adaptd.decoding.recall import compiled_look
from adaptd.models.compiled import kernels
from policies.recall import GRID, Recall

VOCAB = 7


def fed(recall: Recall, width: int, rng: torch.Generator) -> Recall:
    """With 400 contexts of few tokens observed, some often, and any weight best for a class."""
    for domain in ("medical", "math"):
        recall.slot(domain)
    for _ in range(40):
        history = torch.randint(VOCAB, (10, 20), generator=rng)
        length = torch.randint(1, 21, (10,), generator=rng)
        ids = torch.rand(10, 50, generator=rng).argsort(1)[:, :width]
        recall.observe(history, length, ids, torch.rand(10, width, generator=rng).softmax(-1))
    recall._best.random_(0, len(GRID), generator=rng)
    return recall


@pytest.mark.skipif(kernels() is None, reason="no C++ compiler")
@pytest.mark.parametrize(
    ("orders", "echo", "width"),
    [((1, 2, 3, 4), (2, 3), 32), ((1, 3), (1,), 3), ((2,), (), 8), ((), (1, 2), 12)],
)
def test_compiled_code_recalls_the_same(orders: tuple[int, ...], echo: tuple[int, ...], width: int) -> None:
    rng = torch.Generator().manual_seed(0)
    recall = fed(Recall(orders=orders, echo=echo, entries=64, width=width), width, rng)
    look, known = compiled_look(recall), 0
    for size in (1, 5, 40):
        # Some texts are of one token again and again, which an echo names eight times.
        history = torch.randint(VOCAB, (60, size), generator=rng) * (torch.arange(60) % 5 > 0)[:, None]
        # A view, as rows that play beside others have it.
        length = torch.randint(1, size + 1, (60, 2), generator=rng)[:, 0]
        slots = torch.arange(60) % 2
        ours, theirs = look(history, length, slots), recall.look(history, length, slots)
        torch.testing.assert_close(ours.probs, theirs.probs, rtol=1e-6, atol=1e-7)
        assert torch.equal(ours.ids, theirs.ids)
        assert torch.equal(ours.kinds, theirs.kinds)
        assert torch.equal(ours.weights, theirs.weights)
        known += int((ours.probs.sum(-1) > 0.5).sum())
    assert known > 60, "most of it would say nothing"
    # What is observed later is read where it lies.
    recall.observe(history, length, torch.arange(width).expand(60, -1), torch.full((60, width), 1 / width))
    assert torch.equal(look(history, length, slots).ids, recall.look(history, length, slots).ids)
