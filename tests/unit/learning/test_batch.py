"""Index arithmetic of a batch: which logits row meets which token and which captured distribution."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen3Config,
)

from adaptd.bench.verify import rejections_only
from adaptd.learning.batch import _by_length, collate, draft_logits
from adaptd.learning.branches import Choice, reads_branches
from buffers.synthetic import synthetic_trace
from buffers.trace import Branches, Source, Trace
from tests.unit.learning.conftest import VOCAB, tiny


def test_each_position_meets_its_token_and_the_row_before_it() -> None:
    """Off by one here trains the draft on the wrong token and nothing fails: acceptance just never rises."""
    traces = [synthetic_trace(np.random.default_rng(i), n_response=5 + i) for i in range(3)]
    batch = collate(traces, max_tokens=10**6)
    start = 0
    for i, trace in enumerate(traces):
        rows = slice(start, start + trace.response_len)
        start += trace.response_len
        assert batch.row[rows].tolist() == [i] * trace.response_len
        assert batch.column[rows].tolist() == list(range(trace.prompt_len - 1, len(trace.tokens) - 1))
        assert batch.token_ids[rows].tolist() == trace.tokens[trace.prompt_len :].tolist()
        assert batch.topk_ids[rows, 0].tolist() == trace.topk_ids[:, 0].tolist()
        assert batch.source[rows].tolist() == trace.source.tolist()
        assert batch.input_ids[i, : len(trace.tokens)].tolist() == trace.tokens.tolist()
    assert start == len(batch.token_ids) == sum(batch.lengths)


@pytest.mark.parametrize("max_tokens", [4, 9, 18, 30])
def test_a_trace_cut_on_the_left_keeps_only_positions_whose_row_is_left(max_tokens: int) -> None:
    trace = synthetic_trace(np.random.default_rng(0), n_response=12)
    batch = collate([trace], max_tokens)
    kept = min(max_tokens, len(trace.tokens))
    assert batch.input_ids.shape[1] == kept
    expected = min(trace.response_len, kept - 1)
    assert batch.token_ids.tolist() == trace.tokens[-expected:].tolist()
    assert torch.equal(batch.input_ids[0, batch.column + 1], batch.token_ids)
    assert batch.topk_ids[:, 0].tolist() == trace.topk_ids[-expected:, 0].tolist()
    assert batch.source.tolist() == trace.source[-expected:].tolist()


@pytest.mark.parametrize("max_tokens", [9, 30])
def test_where_corrections_alone_were_captured_every_judged_position_is_one(max_tokens: int) -> None:
    trace = rejections_only(synthetic_trace(np.random.default_rng(0), n_response=12))
    batch = collate([trace], max_tokens)
    assert 0 < len(batch.source) == len(batch.judged) < len(batch.token_ids)
    assert set(batch.source.tolist()) == {Source.CORRECTION}


def test_an_empty_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one trace"):
        collate([], 10)


def test_short_and_long_traces_go_apart_and_come_back_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits and gradients of one padded pass, with fewer tokens."""
    lengths = [40, 4, 38, 5, 6]
    traces = [synthetic_trace(np.random.default_rng(i), n_response=n, vocabulary=VOCAB) for i, n in enumerate(lengths)]
    batch = collate(traces, max_tokens=10**6)
    model = tiny(3)
    head = model.lm_head.weight.requires_grad_()
    tokens: list[int] = []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, inputs: tokens.append(inputs[0].numel()))

    def run() -> tuple[torch.Tensor, torch.Tensor, int]:
        tokens.clear()
        logits = draft_logits(model, batch)
        (gradient,) = torch.autograd.grad(logits.logsumexp(-1).square().sum(), head)
        return logits.detach(), gradient, sum(tokens)

    split = run()
    assert len(tokens) == 2
    monkeypatch.setattr("adaptd.learning.batch._WORTH_SPLITTING", 1.0)
    whole = run()
    assert len(tokens) == 1
    torch.testing.assert_close(split[:2], whole[:2], atol=1e-4, rtol=1e-4)
    assert split[2] < 0.7 * whole[2] == 0.7 * batch.input_ids.numel()


def test_traces_of_one_length_stay_together() -> None:
    assert len(_by_length([7])) == len(_by_length([7] * 4)) == len(_by_length([7, 7, 8])) == 1
    assert _by_length([30, 2, 31, 3]) == [[1, 3], [0, 2]]


def sized(config: type[PreTrainedConfig], **more: Any) -> PreTrainedConfig:
    return config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        **more,
    )


@pytest.mark.parametrize(
    "config",
    [
        sized(LlamaConfig),
        sized(Qwen3Config, head_dim=8),
        sized(MistralConfig, sliding_window=6),
        GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=2, n_positions=256),
    ],
    ids=["llama", "qwen3", "sliding window", "gpt2"],
)
def test_prompts_read_without_gradient_leave_the_logits_as_they_are(config: PreTrainedConfig) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    traces = [
        synthetic_trace(np.random.default_rng(i), n_prompt=prompt, n_response=response, vocabulary=VOCAB)
        for i, (prompt, response) in enumerate([(1, 5), (30, 4), (12, 9), (1, 1), (25, 40)])
    ]
    batch = collate(traces, max_tokens=10**6)
    whole, split = (draft_logits(model, batch, prompt_gradient=on) for on in (True, False))
    torch.testing.assert_close(split, whole, atol=1e-5, rtol=1e-4)


def branched(seed: int, n_response: int, **more: Any) -> Trace:
    """With alternatives behind the branches of its corrections: two in one place, and one."""
    rng = np.random.default_rng(seed)
    made = synthetic_trace(
        rng, **({"n_prompt": 5, "n_response": n_response, "n_branch": 4, "vocabulary": VOCAB} | more)
    )
    at, ids = np.array([0, 0, n_response - 1], np.int32), rng.integers(0, VOCAB, (3, 8)).astype(np.uint32)
    tokens = rng.integers(0, VOCAB, 3).astype(np.uint32)
    return made.beside(Branches(at, np.ones(3, np.uint8), tokens, ids, np.zeros((3, 8), np.float16)))


@pytest.mark.parametrize("prompt_gradient", [True, False])
@pytest.mark.parametrize("cut", [10**6, 14])
@pytest.mark.parametrize(
    "config", [sized(LlamaConfig), sized(Qwen3Config, head_dim=8), sized(Qwen3Config, attn_implementation="eager")]
)
def test_each_branch_is_read_as_if_it_stood_alone_behind_its_text(
    config: PreTrainedConfig, cut: int, prompt_gradient: bool
) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    traces = [branched(i, n) for i, n in enumerate([7, 12, 3, 30])]
    batch = collate(traces, cut, branches=Choice())
    plain = collate(traces, cut)
    branches = batch.branches
    assert branches is not None
    assert plain.branches is None
    logits = draft_logits(model, batch, prompt_gradient=prompt_gradient)
    answers, aside = logits[: len(batch.row)], logits[len(batch.row) :]
    torch.testing.assert_close(answers, draft_logits(model, plain), atol=1e-5, rtol=1e-4)
    expected, ids = [], []
    for trace in traces:
        assert trace.branches is not None
        lost, start, taken = max(0, len(trace.tokens) - cut), 0, 0
        for at, n in zip(trace.branches.at.tolist(), trace.branches.lens.tolist(), strict=True):
            rows = slice(start, start + n)
            start += n
            text = trace.tokens[lost : trace.prompt_len + at].tolist() if trace.prompt_len + at > lost else []
            if not text:
                continue
            taken += n
            whole = torch.tensor([text + trace.branches.tokens[rows].tolist()])
            expected.append(model(whole).logits[0, -n:].float())
            ids.append(torch.from_numpy(trace.branches.topk_ids[rows].astype(np.int64)))
        assert taken <= cut
    torch.testing.assert_close(aside, torch.cat(expected), atol=1e-5, rtol=1e-4)
    assert torch.equal(branches.topk_ids, torch.cat(ids))
    assert batch.tokens == plain.tokens + len(aside)


def test_of_too_many_branches_those_that_fit_are_taken_from_everywhere() -> None:
    trace = branched(0, 95, n_branch=12)
    assert trace.branches is not None
    assert len(trace.branches.tokens) > 150
    few = collate([trace], 100, branches=Choice()).branches
    assert few is not None
    assert 85 < len(few.row) <= 100
    fork = few.layout.fork[0, few.column]
    assert int(fork.min()) < 25
    assert int(fork.max()) > 75


def test_a_step_reads_a_share_of_the_branches_and_the_next_one_others() -> None:
    assert sorted(Choice().order(90)) == list(range(90))
    steps = [set(Choice(0.5, step).order(90).tolist()) for step in range(8)]
    assert all(43 <= len(taken) <= 47 for taken in steps)
    assert all(max(np.diff(sorted(taken))) <= 4 for taken in steps), "from everywhere"
    times = np.bincount([i for taken in steps for i in taken], minlength=90)
    assert times.min() >= 2
    assert times.max() <= 6
    trace = branched(0, 95)
    whole, half = (collate([trace], 10**6, branches=choice) for choice in (Choice(), Choice(0.5, 3)))
    assert whole.branches is not None
    assert half.branches is not None
    assert 0.3 < len(half.branches.row) / len(whole.branches.row) < 0.7


def test_only_attention_that_takes_any_mask_reads_branches() -> None:
    def can(config: PreTrainedConfig) -> bool:
        return reads_branches(AutoModelForCausalLM.from_config(config))

    assert can(sized(LlamaConfig))
    assert can(sized(Qwen3Config, head_dim=8))
    assert can(sized(MistralConfig, sliding_window=None))
    assert not can(sized(MistralConfig, sliding_window=6))
    assert not can(sized(Gemma3TextConfig, head_dim=8, sliding_window=6))


def test_no_gradient_reaches_what_stands_in_front_of_the_answer() -> None:
    trace = synthetic_trace(np.random.default_rng(0), n_prompt=9, n_response=5, vocabulary=VOCAB)
    in_front, behind = set(trace.tokens[:8].tolist()), set(trace.tokens[8:-1].tolist())
    model = tiny(3)
    table = model.get_input_embeddings().weight.requires_grad_()

    def moved(prompt_gradient: bool) -> set[int]:
        logits = draft_logits(model, collate([trace], 10**6), prompt_gradient=prompt_gradient)
        (gradient,) = torch.autograd.grad(logits.logsumexp(-1).sum(), table)
        return set(gradient.abs().sum(-1).nonzero()[:, 0].tolist())

    assert moved(True) == in_front | behind
    assert moved(False) == behind
    assert in_front - behind
