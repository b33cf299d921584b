"""The trace's index convention, its checks, the left truncation and the choice of reserved requests."""

import math
from dataclasses import replace

import numpy as np
import pytest

from buffers.synthetic import synthetic_trace
from buffers.trace import NO_TOKEN, Branches, Source, Trace, is_reserved


def trace(**overrides: object) -> Trace:
    return synthetic_trace(np.random.default_rng(7), n_prompt=4, n_response=6, n_top=3, n_draft_top=2, **overrides)


def test_logits_row_t_minus_1_judges_token_t() -> None:
    """The classic bug is to be off by one: three tokens by hand, one of them prompt."""
    three = synthetic_trace(np.random.default_rng(0), n_prompt=1, n_response=2, n_top=1)
    # A toy model whose logits row t puts all its mass on the token that follows it.
    prediction_of_row = {0: three.tokens[1], 1: three.tokens[2]}

    assert three.judging_rows.tolist() == [0, 1]
    assert [prediction_of_row[row] for row in three.judging_rows.tolist()] == three.response.tolist()


def test_a_synthetic_trace_is_valid_and_has_the_size_the_design_promises() -> None:
    full = synthetic_trace(np.random.default_rng(0), n_prompt=1, n_response=100, n_top=32)
    full.validate()
    assert 190 <= full.nbytes / full.response_len <= 250


def test_rows_kept_for_rejections_only_say_which_positions_they_judge() -> None:
    every = trace()
    at = every.rejected_at
    assert 0 < len(at) < every.response_len
    only = trace(topk_ids=every.topk_ids[at], topk_logprobs=every.topk_logprobs[at])
    only.validate()

    assert every.judged_at.tolist() == list(range(6))
    assert only.judged_at.tolist() == at.tolist()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"prompt_len": 0}, "prompt_len"),
        ({"prompt_len": 10}, "prompt_len"),
        ({"source": np.zeros(5, np.uint8)}, "source has shape"),
        ({"source": np.full(6, 9, np.uint8)}, "source"),
        ({"tokens": np.zeros(10, np.int64)}, "tokens has dtype int64"),
        ({"topk_ids": np.zeros((6, 2), np.uint32)}, "axis K"),
        ({"topk_ids": np.zeros(6, np.uint32)}, "1 axes"),
        ({"features": np.zeros((9, 8), np.uint16)}, "features has shape"),
        ({"rejected": np.full(6, NO_TOKEN, np.int32)}, "rejected must name"),
        ({"temperature": math.nan}, "temperature"),
        ({"shift": math.inf}, "shift"),
        ({"surprise": 0.0}, "surprise"),
    ],
)
def test_contradicting_fields_are_named(overrides: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trace(**overrides).validate()


def test_corrections_must_be_ascending_positions_of_the_response() -> None:
    good = trace()
    for at in ([2, 1], [0, 6], [-1, 0]):
        bad = trace(
            rejected_at=np.array(at, np.int32),
            rejected=np.ones(6, np.int32),
            draft_topk_ids=np.zeros((2, 2), np.uint32),
            draft_topk_logprobs=np.zeros((2, 2), np.float16),
        )
        with pytest.raises(ValueError, match="rejected_at"):
            bad.validate()
    good.validate()


def test_truncation_inside_the_prompt_keeps_the_whole_response() -> None:
    whole = trace()
    short = whole.truncate_left(8)
    short.validate()
    assert (short.prompt_len, short.response_len) == (2, 6)
    assert short.response.tolist() == whole.response.tolist()
    assert short.topk_ids.tolist() == whole.topk_ids.tolist()


def test_truncation_inside_the_response_keeps_every_row_with_its_own_token() -> None:
    whole = trace(features=np.arange(20, dtype=np.uint16).reshape(10, 2), n_tail=3)
    short = whole.truncate_left(4)  # tokens 6..9: one of context, response positions 3..5 remain
    short.validate()
    assert (short.prompt_len, short.response_len) == (1, 3)
    assert short.tokens.tolist() == whole.tokens[6:].tolist()
    for name in ("topk_ids", "topk_logprobs", "tail_ids", "source", "rejected", "target_logprob", "draft_logprob"):
        assert getattr(short, name).tolist() == getattr(whole, name)[3:].tolist(), name
    kept = [i for i, at in enumerate(whole.rejected_at.tolist()) if at >= 3]
    assert short.rejected_at.tolist() == [whole.rejected_at[i] - 3 for i in kept]
    assert short.draft_topk_ids.tolist() == whole.draft_topk_ids[kept].tolist()
    assert short.features is not None
    assert short.features.tolist() == [[12, 13], [14, 15], [16, 17], [18, 19]]


def test_a_cut_takes_the_branches_of_the_corrections_that_it_takes() -> None:
    whole = synthetic_trace(np.random.default_rng(0), n_prompt=4, n_response=30, n_branch=3, n_tail=4)
    at = whole.rejected_at
    assert whole.branches is not None
    assert 1 < (at >= 15).sum() < len(at) - 1, "of both kinds"
    short = whole.truncate_left(16)
    short.validate()
    assert short.branches is not None
    behind = np.repeat(at >= 15, whole.branches.lens)
    assert short.branches.lens.tolist() == whole.branches.lens[at >= 15].tolist()
    for name in ("tokens", "topk_ids", "topk_logprobs", "tail_ids"):
        assert getattr(short.branches, name).tolist() == getattr(whole.branches, name)[behind].tolist(), name


def test_further_branches_stand_behind_those_that_are_there_and_are_cut_like_them() -> None:
    whole = synthetic_trace(np.random.default_rng(0), n_prompt=4, n_response=50, n_branch=3)
    plain = whole.without_branches()
    more = Branches(
        at=np.array([0, 0, 40], np.int32),
        lens=np.array([1, 1, 1], np.uint8),
        tokens=np.array([5, 6, 7], np.uint32),
        topk_ids=np.array([[1, 2], [3, 4], [5, 6]], np.uint32),
        topk_logprobs=np.array([[-1, -2], [-3, -4], [-5, -6]], np.float16),
    )
    assert plain.beside(more).branches is more
    assert whole.branches is not None
    both = whole.beside(more)
    both.validate()
    assert both.branches is not None
    assert both.branches.at.tolist() == [*whole.branches.at.tolist(), 0, 0, 40]
    assert both.branches.tokens.tolist() == [*whole.branches.tokens.tolist(), 5, 6, 7]
    assert both.branches.topk_ids.shape[1] == 2, "as many candidates as all have"
    assert both.branches.topk_ids[:-3].tolist() == whole.branches.topk_ids[:, :2].tolist()
    short = plain.beside(more).truncate_left(20)
    short.validate()
    assert short.branches is not None
    assert short.branches.tokens.tolist() == [7]
    assert short.response[short.branches.at[0]] == plain.response[40]


def test_draws_behind_branches_are_kept_together_only_if_they_left_over_the_same_tokens() -> None:
    first, second, fewer = (
        synthetic_trace(np.random.default_rng(top), n_branch=2, n_branch_top=top // 10, n_tail=3).branches
        for top in (80, 81, 60)
    )
    assert first is not None
    assert second is not None
    assert fewer is not None
    joined = first.plus(second).tail_ids
    assert joined is not None
    assert first.tail_ids is not None
    assert second.tail_ids is not None
    assert joined.tolist() == first.tail_ids.tolist() + second.tail_ids.tolist()
    assert first.plus(fewer).tail_ids is None, "drawn from what 8 left over, and 6 are kept"
    assert first.plus(replace(second, tail_ids=None)).tail_ids is None


def test_branches_that_contradict_themselves_are_named() -> None:
    whole = trace(n_branch=3)
    behind = whole.branches
    assert behind is not None
    whole.validate()
    for name, value, message in (
        ("lens", behind.lens + np.uint8(1), r"branch_lens sums to \d+; it must be the \d+ branch_tokens"),
        ("lens", behind.lens[1:], "branch_lens has shape"),
        ("at", behind.at + np.int32(whole.response_len), r"branch_at \(\d+\) must be a response position, 0 to \d+"),
        ("at", behind.at - np.int32(whole.response_len), r"branch_at \(-\d+\) must be a response position"),
        ("topk_ids", behind.topk_ids[1:], "branch_topk_ids has shape"),
        ("tokens", behind.tokens.astype(np.int64), "branch_tokens has dtype int64"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(whole, branches=replace(behind, **{name: value})).validate()


def test_a_trace_without_its_branches_is_the_answer_alone() -> None:
    whole, plain = trace(n_branch=3), trace()
    assert whole.nbytes > whole.without_branches().nbytes == plain.nbytes
    assert plain.without_branches() is plain


def test_truncation_of_rejected_only_rows_follows_the_corrections() -> None:
    at = np.array([0, 2, 5], np.int32)
    rejected = np.full(6, NO_TOKEN, np.int32)
    rejected[at] = 1
    source = np.full(6, Source.ACCEPTED, np.uint8)
    source[at] = Source.CORRECTION
    rows = np.array([[10], [12], [15]], np.uint32)
    whole = trace(
        rejected_at=at,
        rejected=rejected,
        source=source,
        topk_ids=rows,
        topk_logprobs=np.zeros((3, 1), np.float16),
        draft_topk_ids=rows,
        draft_topk_logprobs=np.zeros((3, 1), np.float16),
    )
    short = whole.truncate_left(6)  # response positions 1..5 remain
    short.validate()
    assert short.judged_at.tolist() == [1, 4]
    assert short.topk_ids.tolist() == [[12], [15]]


def test_truncation_leaves_a_short_trace_alone_and_refuses_less_than_two_tokens() -> None:
    whole = trace()
    assert whole.truncate_left(10) is whole
    with pytest.raises(ValueError, match=r"max_tokens \(1\)"):
        whole.truncate_left(1)


def test_the_reserved_share_is_met_and_fixed_for_each_request() -> None:
    """20,000 ids at 5 %: 1,000 expected, standard deviation 31; four of them is p < 1e-4."""
    chosen = [is_reserved(f"request-{i}", 0.05) for i in range(20_000)]
    assert abs(sum(chosen) - 1000) < 4 * 31
    assert chosen == [is_reserved(f"request-{i}", 0.05) for i in range(20_000)]
    assert not is_reserved("any", 0.0)
    assert is_reserved("any", 1.0)
    with pytest.raises(ValueError, match=r"share \(1.5\)"):
        is_reserved("any", 1.5)


def test_whoever_is_reserved_at_a_small_share_is_reserved_at_a_larger_one() -> None:
    """Raising the share must not move traces that were trained on into the gate's set at the same time as others leave."""
    ids = [f"r{i}" for i in range(2000)]
    assert {i for i in ids if is_reserved(i, 0.05)} <= {i for i in ids if is_reserved(i, 0.2)}
