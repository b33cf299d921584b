"""Answers of the target, in batches, and what they say of it: variety, perplexity and the draft's acceptance."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from adaptd.pocket.text import Encoded, batches, collate, render
from policies.acceptance import acceptance_profile


@torch.inference_mode()
def answer(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    domain: str,
    *,
    temperature: float,
    max_new_tokens: int,
    seed: int,
    batch: int = 64,
) -> list[Encoded]:
    """Generate one answer a prompt (temperature 0 is greedy), prompts of similar length together."""
    torch.manual_seed(seed)
    tokenizer.padding_side = "left"
    answers: dict[int, Encoded] = {}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature > 0 else {"do_sample": False}
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        inputs = tokenizer(
            [render(prompts[i]) for i in rows], add_special_tokens=False, padding=True, return_tensors="pt"
        )
        inputs.pop("token_type_ids", None)
        generated = model.generate(  # type: ignore[misc]
            **inputs, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id, **sampling
        )
        outputs = cast(torch.Tensor, generated)
        width = inputs["input_ids"].shape[1]
        for row, index in enumerate(rows):
            prompt = inputs["input_ids"][row][inputs["attention_mask"][row].bool()].tolist()
            reply = outputs[row, width:].tolist()
            if tokenizer.eos_token_id in reply:
                reply = reply[: reply.index(tokenizer.eos_token_id) + 1]
            answers[index] = Encoded(prompt + reply, len(prompt), domain)
    return [answers[i] for i in range(len(prompts))]


def looping_share(answers: Sequence[Encoded], n: int = 4, most: int = 8) -> float:
    """Share of answers in which some n-gram of tokens stands more than `most` times."""
    looping = 0
    for item in answers:
        ids = item.ids[item.prompt_len :]
        grams = Counter(tuple(ids[i : i + n]) for i in range(len(ids) - n + 1))
        looping += any(count > most for count in grams.values())
    return looping / max(1, len(answers))


@torch.inference_mode()
def perplexity(model: LlamaForCausalLM, items: Sequence[Encoded], pad: int) -> float:
    """exp of the mean negative log-likelihood per answer token."""
    total, count = 0.0, 0
    for batch in batches(items, 8192, torch.Generator().manual_seed(0)):
        ids, _, is_answer = collate(batch, pad)
        keep = is_answer[:, 1:]
        logprobs = model(input_ids=ids).logits[:, :-1][keep].float().log_softmax(-1)
        total -= logprobs.gather(-1, ids[:, 1:][keep][:, None]).sum().item()
        count += int(keep.sum())
    return math.exp(total / count)


class Comparison(NamedTuple):
    """A tuned model beside its base on the same text."""

    kl: float
    """Mean KL(tuned || base) per answer token over the full vocabulary, nats."""
    perplexity_base: float
    perplexity_tuned: float


@torch.inference_mode()
def compare(tuned: LlamaForCausalLM, base: LlamaForCausalLM, items: Sequence[Encoded], pad: int) -> Comparison:
    """How far a tuned model is from its base on answer tokens, and how well each predicts them."""
    totals, count = torch.zeros(3, dtype=torch.float64), 0
    for batch in batches(items, 4096, torch.Generator().manual_seed(0)):
        ids, _, is_answer = collate(batch, pad)
        keep = is_answer[:, 1:]
        p, q = (m(input_ids=ids).logits[:, :-1][keep].float().log_softmax(-1) for m in (tuned, base))
        emitted = ids[:, 1:][keep][:, None]
        kl = (p.exp() * (p - q)).sum()
        totals += torch.stack([kl, -q.gather(-1, emitted).sum(), -p.gather(-1, emitted).sum()]).double()
        count += int(keep.sum())
    mean = (totals / count).tolist()
    return Comparison(mean[0], math.exp(mean[1]), math.exp(mean[2]))


@torch.inference_mode()
def greedy_acceptance(draft: LlamaForCausalLM, answers: Sequence[Encoded], k: int, pad: int) -> float:
    """Mean acceptance length of `draft` along the target's greedy answers: exact from one teacher-forced pass."""
    emitted = rounds = 0.0
    for batch in batches(answers, 8192, torch.Generator().manual_seed(0)):
        ids, _, is_answer = collate(batch, pad)
        match = draft(input_ids=ids).logits[:, :-1].argmax(-1) == ids[:, 1:]
        for row, keep in enumerate(is_answer[:, 1:]):
            profile = acceptance_profile(match[row][keep].double().numpy(), k)
            emitted += profile.emitted
            rounds += profile.rounds
    return emitted / rounds
