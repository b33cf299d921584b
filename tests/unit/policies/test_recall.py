"""Recall: contexts, means, weights, echoes; a table that stays within its bounds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from policies.recall import GRID, Recall

V = 16


def history(*tokens: int) -> tuple[Tensor, Tensor]:
    return torch.tensor([tokens]), torch.tensor([len(tokens)])


def remember(recall: Recall, tokens: tuple[int, ...], probs: dict[int, float]) -> None:
    recall.observe(*history(*tokens), torch.tensor([list(probs)]), torch.tensor([list(probs.values())]))


def dense(recall: Recall, source: int, *tokens: int) -> Tensor:
    found = recall.look(*history(*tokens))
    return torch.zeros(1, V).scatter_add(1, found.ids[:, source], found.probs[:, source])[0]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"orders": (0,)}, r"orders \(0\) must be at least 1"),
        ({"echo": (2, -1)}, r"echo \(2, -1\)"),
        ({"entries": 0}, r"entries \(0\)"),
        ({"width": 0}, r"width \(0\)"),
        ({"orders": (), "echo": ()}, "nothing to recall from"),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(settings: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Recall(**settings)  # type: ignore[arg-type]


def test_a_context_gives_the_mean_of_what_was_served_behind_it() -> None:
    recall = Recall(orders=(2,), echo=(), entries=64, width=4)
    remember(recall, (9, 5, 6), {1: 0.5, 2: 0.5})
    remember(recall, (7, 5, 6), {2: 0.5, 3: 0.5})
    torch.testing.assert_close(dense(recall, 0, 1, 5, 6)[1:4], torch.tensor([0.25, 0.5, 0.25]), atol=1e-3, rtol=0)


def test_each_order_looks_at_its_own_length_and_only_at_known_tokens() -> None:
    recall = Recall(orders=(1, 3), echo=(), entries=64, width=4)
    remember(recall, (4, 5, 6), {1: 1.0})
    assert dense(recall, 0, 9, 6)[1] == 1.0, "one token fits"
    assert dense(recall, 1, 4, 5, 6)[1] == 1.0
    assert dense(recall, 1, 9, 5, 6).sum() == 0.0, "another third token is another context"
    assert dense(recall, 1, 5, 6).sum() == 0.0, "a text shorter than the context has none"
    padded = recall.look(torch.tensor([[4, 5, 6, 6, 6]]), torch.tensor([3]))
    assert padded.probs[0, 1].sum() == 1.0, "what lies behind the length is not read"


def test_an_echo_is_what_followed_the_same_tokens_in_the_same_text() -> None:
    recall = Recall(orders=(), echo=(2,))
    said = dense(recall, 0, 5, 6, 1, 5, 6, 2, 5, 6, 1, 5, 6)
    torch.testing.assert_close(said[[1, 2]], torch.tensor([2 / 3, 1 / 3]))
    assert dense(recall, 0, 5, 6, 1).sum() == 0.0


def test_an_unknown_context_leaves_the_draft_alone() -> None:
    recall = Recall(entries=64)
    q = torch.rand(1, V).softmax(-1)
    torch.testing.assert_close(recall.mix(q, recall.look(*history(1, 2, 3))), q)


def test_the_mixture_is_a_distribution_and_agrees_with_its_value_at_one_token() -> None:
    torch.manual_seed(0)
    recall = Recall(entries=256, width=4)
    text = torch.randint(0, 6, (1, 200))
    lengths = torch.arange(1, 200)
    rows = text.expand(len(lengths), -1)
    probs = torch.rand(len(lengths), 3).softmax(-1)
    recall.observe(rows, lengths, torch.tensor([[1, 2, 3]]).expand(len(lengths), -1), probs)
    found = recall.look(rows, lengths)
    q = torch.rand(len(lengths), V).softmax(-1)
    mixed = recall.mix(q, found)
    torch.testing.assert_close(mixed.sum(-1), torch.ones(len(lengths)))
    token = torch.randint(0, V, (len(lengths),))
    own = q.gather(1, token[:, None])[:, 0]
    torch.testing.assert_close(found.mixed_at(own, token), mixed.gather(1, token[:, None])[:, 0])


@pytest.mark.parametrize("better", ["source", "draft"])
def test_weights_follow_whoever_is_right(better: str) -> None:
    recall = Recall(orders=(1,), echo=(), entries=64, width=4)
    remember(recall, (5,), {1: 1.0})
    for _ in range(20):
        found = recall.look(*history(5))
        token = torch.tensor([1 if better == "source" else 2])
        own = torch.tensor([0.05 if better == "source" else 0.95])
        recall.learn(found, own, torch.ones(1), token, torch.ones(1, dtype=torch.bool))
    weight = float(recall.look(*history(5)).weights[0, 0])
    assert weight == pytest.approx(GRID[-1] if better == "source" else 0.0)


def test_positions_that_were_not_reached_are_no_evidence() -> None:
    recall = Recall(orders=(1,), echo=(), entries=64, width=4)
    remember(recall, (5,), {1: 1.0})
    before = recall.look(*history(5)).weights
    for _ in range(20):
        found = recall.look(*history(5))
        recall.learn(found, torch.zeros(1), torch.ones(1), torch.tensor([1]), torch.zeros(1, dtype=torch.bool))
    torch.testing.assert_close(recall.look(*history(5)).weights, before)


def test_the_table_stays_within_its_entries_and_lets_go_of_the_oldest() -> None:
    recall = Recall(orders=(2,), echo=(), entries=64, width=2)
    size = recall.nbytes
    for first in range(40):
        for second in range(40):
            remember(recall, (first, second), {1: 1.0})
    assert len(recall) <= recall.capacity == 64
    assert recall.nbytes == size
    assert dense(recall, 0, 39, 39)[1] == 1.0, "what came last is there"


def test_one_context_seen_many_times_in_one_answer_counts_each_time() -> None:
    recall = Recall(orders=(1,), echo=(), entries=64, width=4)
    rows = torch.tensor([[5, 5, 5, 5, 5]]).expand(4, -1)
    probs = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    recall.observe(rows, torch.tensor([1, 2, 3, 4]), torch.tensor([[1, 2]]).expand(4, -1), probs)
    torch.testing.assert_close(dense(recall, 0, 5)[1:3], torch.tensor([0.75, 0.25]), atol=1e-3, rtol=0)


def test_each_domain_has_weights_of_its_own_and_finds_them_again() -> None:
    recall = Recall(orders=(1,), echo=(), entries=64, width=4)
    remember(recall, (5,), {1: 1.0})
    slots = {name: torch.tensor([recall.slot(name)]) for name in ("known", "new", "known")}
    for name, own, token in (("known", 0.95, 2), ("new", 0.05, 1)):
        for _ in range(20):
            found = recall.look(*history(5), slots[name])
            recall.learn(found, torch.tensor([own]), torch.ones(1), torch.tensor([token]), torch.ones(1).bool())
    assert float(recall.look(*history(5), slots["known"]).weights) == 0.0
    assert float(recall.look(*history(5), slots["new"]).weights) == pytest.approx(GRID[-1])
    unknown = recall.look(*history(9), slots["new"])
    assert float(unknown.weights) == 0.0, "what knows nothing has no weight"


def test_domains_beyond_the_limit_share_the_first_ones_weights() -> None:
    recall = Recall(orders=(1,), echo=(), entries=64, width=4)
    slots = [recall.slot(f"domain {i}") for i in range(100)]
    assert slots[0] == slots[-1] == 0
    assert len(set(slots)) > 8
    assert recall.slot("domain 3") == slots[3]
