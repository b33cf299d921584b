"""Greedy speculative output is transformers' greedy output, token for token, however requests share the batch."""

from functools import cache

import pytest
import torch

from adaptd.decoding.engine import SpeculativeDecoder
from adaptd.decoding.request import DecodeRequest, SamplingParams
from tests.unit.decoding.tiny import disturb, greedy_reference, make_draft, make_model, make_prompts, serve

VOCAB, NEW = 97, 14


@cache
def case(kind: str) -> tuple[torch.nn.Module, list[list[int]], list[list[int]]]:
    target = make_model(kind, vocab=VOCAB)
    prompts = make_prompts(30, VOCAB)
    answers = greedy_reference(target, prompts, NEW)
    assert len({token for answer in answers for token in answer}) > VOCAB // 2, "degenerate model"
    return target, prompts, answers


def requests_for(prompts: list[list[int]]) -> list[DecodeRequest]:
    """Lengths differ, so rows leave and join all the time."""
    return [
        DecodeRequest(str(at), prompt, SamplingParams(temperature=0.0, max_tokens=NEW - at % 7))
        for at, prompt in enumerate(prompts)
    ]


@pytest.mark.parametrize(
    ("kind", "batch", "k"),
    [*(("llama", batch, k) for batch in (1, 8) for k in (1, 3, 4)), ("qwen3", 1, 3), ("qwen3", 8, 4)],
)
def test_output_equals_transformers_with_draft_weights_changed_between_rounds(kind: str, batch: int, k: int) -> None:
    target, prompts, answers = case(kind)
    draft = make_draft(target, noise=0.02)
    swaps = {5: 0.05, 9: 0.5}
    engine = SpeculativeDecoder(target, draft, k=k, max_batch=batch, max_length=80)
    done = serve(
        engine, requests_for(prompts), lambda round_: disturb(draft, swaps[round_], round_) if round_ in swaps else None
    )
    accepted = sum(finished.stats.accepted for finished in done.values())
    assert accepted > 0
    for at, answer in enumerate(answers):
        assert done[str(at)].token_ids == tuple(answer[: NEW - at % 7])
        assert done[str(at)].finish_reason == "length"


def test_a_good_draft_saves_rounds_and_the_counts_add_up() -> None:
    target, prompts, answers = case("llama")
    engine = SpeculativeDecoder(target, make_draft(target, noise=0.004), k=3, max_batch=8, max_length=80)
    done = serve(engine, requests_for(prompts))
    for at, answer in enumerate(answers):
        assert done[str(at)].token_ids == tuple(answer[: NEW - at % 7])
    stats = [finished.stats for finished in done.values()]
    assert sum(s.emitted for s in stats) / sum(s.rounds for s in stats) > 2.0
    for s in stats:
        assert s.accepted == sum(s.accepted_at)
        assert s.reached_at[1:] <= s.accepted_at[:-1]
        assert s.rounds - 1 <= s.emitted - s.accepted <= s.rounds


@pytest.mark.parametrize("prefill_tokens", [1, 7, 40])
def test_prompts_read_in_chunks_while_others_decode_give_the_same_output(prefill_tokens: int) -> None:
    target, prompts, answers = case("llama")
    engine = SpeculativeDecoder(
        target, make_draft(target), k=3, max_batch=4, max_length=80, prefill_tokens=prefill_tokens
    )
    done = serve(engine, requests_for(prompts[:16]))
    assert [done[str(at)].token_ids for at in range(16)] == [tuple(answers[at][: NEW - at % 7]) for at in range(16)]


@pytest.mark.parametrize(
    ("kind", "extra"),
    [
        ("llama", {"attn_implementation": "eager"}),
        ("llama", {"num_key_value_heads": 4}),
        ("mistral", {"sliding_window": 12}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 10, "max_window_layers": 1}),
    ],
)
def test_other_attention_layouts_are_followed_as_well(kind: str, extra: dict[str, object]) -> None:
    target = make_model(kind, vocab=VOCAB, **extra)
    prompts = make_prompts(10, VOCAB)
    answers = greedy_reference(target, prompts, NEW)
    engine = SpeculativeDecoder(target, make_draft(target), k=3, max_batch=4, max_length=80)
    done = serve(engine, requests_for(prompts))
    for at, answer in enumerate(answers):
        assert done[str(at)].token_ids == tuple(answer[: NEW - at % 7])


@pytest.mark.parametrize("draft_vocab", [VOCAB - 9, VOCAB + 9])
def test_a_draft_padded_to_another_width_changes_nothing(draft_vocab: int) -> None:
    """Families pad their embeddings differently; here the target even says tokens that the draft cannot embed."""
    target, prompts, answers = case("llama")
    draft = make_model("llama", vocab=draft_vocab, seed=3, layers=1)
    engine = SpeculativeDecoder(target, draft, k=3, max_batch=4, max_length=80)
    done = serve(engine, requests_for(prompts[:12]))
    for at in range(12):
        assert done[str(at)].token_ids == tuple(answers[at][: NEW - at % 7])


def test_decoding_stops_at_the_end_of_the_context_with_every_token_right() -> None:
    target, prompts, answers = case("llama")
    prompt, answer = prompts[0], answers[0]
    limit = len(prompt) + 11
    target_small = make_model("llama", vocab=VOCAB, max_position_embeddings=limit)
    target_small.load_state_dict(target.state_dict())
    engine = SpeculativeDecoder(target_small, make_draft(target_small), k=4, max_batch=2, max_length=limit)
    done = serve(engine, [DecodeRequest("r", prompt, SamplingParams(temperature=0.0, max_tokens=99))])
    assert done["r"].token_ids == tuple(answer[:11])
    assert done["r"].finish_reason == "length"


def test_bfloat16_decodes_what_a_plain_bfloat16_pass_finds_most_likely() -> None:
    """Ties are common in bfloat16, so each token is compared with the maximum it must reach, not with an argmax."""
    target = make_model("llama", vocab=VOCAB).to(torch.bfloat16)
    engine = SpeculativeDecoder(target, make_draft(target), k=3, max_batch=4, max_length=80)
    prompts = make_prompts(8, VOCAB)
    done = serve(engine, requests_for(prompts))
    for at, prompt in enumerate(prompts):
        answer = list(done[str(at)].token_ids)
        with torch.no_grad():
            logits = target(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].float()
        said = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
        assert (logits.max(-1).values - said).max() < 0.05 * logits.std()
