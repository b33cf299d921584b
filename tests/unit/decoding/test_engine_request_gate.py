"""A decoder whose draft gates requests: each row gets what its own prompt and domain say, whoever shares the batch."""

import torch

from adaptd.decoding.engine import SpeculativeDecoder
from adaptd.decoding.request import DecodeRequest, Finished, SamplingParams
from adaptd.models.request_gate import request_gate
from adaptd.models.scope import AdaptedDraft, ScopeConfig
from tests.unit.decoding.tiny import greedy_reference, make_draft, make_model, make_prompts, serve

VOCAB, NEW = 97, 14
CONFIG = ScopeConfig(width=16, lora_rank=4, head_rank=4, embed_rank=4)


def adapted(target: torch.nn.Module) -> AdaptedDraft:
    """What was learned is noise, under a gate that differs by prompt."""
    draft = AdaptedDraft(make_draft(target, noise=0.02), CONFIG, serving=True)
    generator = torch.Generator().manual_seed(2)
    draft.load({n: torch.randn(t.shape, generator=generator) * 0.3 for n, t in draft.expected().items()})
    return draft


def answers(
    target: torch.nn.Module, draft: torch.nn.Module, prompts: list[list[int]], batch: int
) -> dict[str, Finished]:
    engine = SpeculativeDecoder(target, draft, k=3, max_batch=batch, max_length=80)
    requests = [
        DecodeRequest(str(i), p, SamplingParams(temperature=0.0, max_tokens=NEW), domain="ab"[i % 2])
        for i, p in enumerate(prompts)
    ]
    return serve(engine, requests)


def test_a_row_gets_the_same_draft_alone_and_among_others() -> None:
    target = make_model(vocab=VOCAB)
    prompts = make_prompts(16, VOCAB)
    draft = adapted(target)
    gate = request_gate(draft.model)
    assert gate is not None
    assert gate(gate.features(prompts)).std() > 0.1, "prompts are told apart"
    alone, together = (answers(target, draft.model, prompts, batch) for batch in (1, 8))
    assert [together[str(i)].token_ids for i in range(16)] == [tuple(a) for a in greedy_reference(target, prompts, NEW)]
    assert [alone[str(i)].stats for i in range(16)] == [together[str(i)].stats for i in range(16)]


def test_a_domain_on_the_base_draft_is_decoded_with_it_and_the_other_one_is_not() -> None:
    target = make_model(vocab=VOCAB)
    prompts = make_prompts(16, VOCAB)
    draft = adapted(target)
    learned = answers(target, draft.model, prompts, 8)
    draft.keep_on_base({"a"})
    mixed = answers(target, draft.model, prompts, 8)
    base = answers(target, make_draft(target, noise=0.02), prompts, 8)
    for i in range(16):
        expected = base if i % 2 == 0 else learned
        assert mixed[str(i)].stats == expected[str(i)].stats
    assert [base[str(i)].stats for i in range(0, 16, 2)] != [learned[str(i)].stats for i in range(0, 16, 2)]


def test_a_swapped_gate_is_read_in_the_next_round() -> None:
    target = make_model(vocab=VOCAB)
    draft = adapted(target)
    engine = SpeculativeDecoder(target, draft.model, k=3, max_batch=2, max_length=80)
    seen: list[torch.Tensor] = []
    gate = request_gate(draft.model)
    assert gate is not None
    gate.register_forward_hook(lambda _gate, _inputs, opened: seen.append(opened.clone()))
    request = DecodeRequest("0", make_prompts(1, VOCAB, shortest=8)[0], SamplingParams(temperature=0.0, max_tokens=NEW))

    def swap(round_: int) -> None:
        if round_ == 2:
            with torch.no_grad():
                gate.bias.fill_(-20.0)
                gate.weight.zero_()

    serve(engine, [request], swap)
    assert seen[0].item() > 1e-6
    assert seen[-1].item() < 1e-6
