"""The pocket tokenizer and the encoding of exchanges into token sequences."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from adaptd.pocket.data import Exchange

VOCAB_SIZE = 4096
CONTEXT = 1024
SPECIAL = {"pad": "<|pad|>", "bos": "<|begin|>", "eos": "<|end|>"}
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


class Encoded(NamedTuple):
    """One exchange as tokens: `ids[:prompt_len]` is the rendered prompt."""

    ids: list[int]
    prompt_len: int
    domain: str


def train_tokenizer(texts: Iterable[str], directory: Path) -> PreTrainedTokenizerFast:
    """Train the byte-level BPE tokenizer and save it as a Hugging Face directory."""
    core = Tokenizer(models.BPE())
    # Digits are split one by one: arithmetic is learnable and number tokens do not fill a small vocabulary.
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[*SPECIAL.values(), *ROLES],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=SPECIAL["pad"],
        bos_token=SPECIAL["bos"],
        eos_token=SPECIAL["eos"],
        additional_special_tokens=list(ROLES),
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(directory)
    return tokenizer


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer that `train_tokenizer` saved."""
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(folder)
    return tokenizer


def render(prompt: str) -> str:
    """The chat template for one user turn, without a tokenizer in the loop (special tokens as text)."""
    return f"{SPECIAL['bos']}<|user|>{prompt}{SPECIAL['eos']}<|assistant|>"


def encode(
    tokenizer: PreTrainedTokenizerFast, exchanges: Sequence[Exchange], max_prompt: int, max_tokens: int
) -> list[Encoded]:
    """Tokenize exchanges; drop those whose prompt is longer than `max_prompt`, cut answers at `max_tokens` in all."""
    prompts = tokenizer([render(e.prompt) for e in exchanges], add_special_tokens=False)["input_ids"]
    answers = tokenizer([e.response for e in exchanges], add_special_tokens=False)["input_ids"]
    end = tokenizer.eos_token_id
    return [
        Encoded((prompt + answer + [end])[:max_tokens], len(prompt), exchange.domain)
        for exchange, prompt, answer in zip(exchanges, prompts, answers, strict=True)
        if len(prompt) <= max_prompt
    ]


def batches(items: Sequence[Encoded], tokens: int, generator: torch.Generator) -> list[list[Encoded]]:
    """One epoch of batches of about `tokens` tokens, each of similar lengths (little padding), in random order."""
    noise = torch.rand(len(items), generator=generator).mul_(8.0).tolist()
    order = sorted(range(len(items)), key=lambda i: len(items[i].ids) + noise[i])
    epoch: list[list[Encoded]] = [[]]
    for index in order:
        if epoch[-1] and (len(epoch[-1]) + 1) * len(items[index].ids) > tokens:
            epoch.append([])
        epoch[-1].append(items[index])
    return [epoch[i] for i in torch.randperm(len(epoch), generator=generator).tolist()]


def collate(batch: Sequence[Encoded], pad: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Right-pad a batch.

    Returns: ids [B, T] int64; is_token [B, T] bool; is_answer [B, T] bool (False on prompt and padding).
    """
    width = max(len(item.ids) for item in batch)
    ids = torch.full((len(batch), width), pad, dtype=torch.long)
    is_token = torch.zeros((len(batch), width), dtype=torch.bool)
    is_answer = torch.zeros((len(batch), width), dtype=torch.bool)
    for row, item in enumerate(batch):
        length = len(item.ids)
        ids[row, :length] = torch.tensor(item.ids)
        is_token[row, :length] = True
        is_answer[row, item.prompt_len : length] = True
    return ids, is_token, is_answer
