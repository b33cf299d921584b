"""A record to the tokens that the target saw and gave."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from adaptd.errors import RequestRefused
from adaptd.ingest.record import Record
from adaptd.models.chat import render_answer, render_chat, with_arguments


class Unrenderable(ValueError):
    """A record has no tokens under this target; the message is the reason in a few words."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """Tokens of one record; no answer where none is wanted or logged."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...] = ()


class Renderer:
    """Renders records with one target's tokenizer.

    Args:
      ends: tokens that end an answer.
      vocab: width of the target's logits.
      max_length: tokens of prompt and answer together; an answer is cut to what there is room for.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, ends: Collection[int], vocab: int, max_length: int
    ) -> None:
        self._tokenizer, self._ends, self._vocab, self._max_length = tokenizer, ends, vocab, max_length

    def render(self, record: Record, *, own: bool, with_answer: bool) -> Rendered:
        """Tokens of the question, and of the answer if it is wanted.

        Args:
          own: whether the target wrote the answer: only then do logged token ids mean the same.

        Raises:
          Unrenderable: too long, nothing in it, or refused by the chat template.
        """
        try:
            prompt = self._prompt(record, own)
            answer = self._answer(record, own) if with_answer else ()
        except RequestRefused as error:
            raise Unrenderable(_short(error)) from error
        room = self._max_length - len(prompt)
        if room < 1:
            raise Unrenderable("the prompt is longer than the context (engine.max_length)")
        if with_answer and not answer:
            raise Unrenderable("no answer")
        return Rendered(prompt, answer[:room])

    def _known(self, ids: tuple[int, ...], own: bool) -> bool:
        return own and bool(ids) and max(ids) < self._vocab

    def _prompt(self, record: Record, own: bool) -> tuple[int, ...]:
        if self._known(ids := tuple(record.prompt_ids), own):
            return ids
        if record.messages:
            messages = [with_arguments(m) for m in record.messages]
            return tuple(render_chat(self._tokenizer, messages, record.tools, record.template_kwargs))
        if not record.prompt:
            raise Unrenderable("token ids of another vocabulary")
        # A prompt that a template has rendered brings its own beginning-of-sequence token.
        begun = bool(self._tokenizer.bos_token) and record.prompt.startswith(str(self._tokenizer.bos_token))
        found: list[int] = self._tokenizer(record.prompt, add_special_tokens=not begun)["input_ids"]
        if not found:
            raise Unrenderable("no message content")
        return tuple(found)

    def _answer(self, record: Record, own: bool) -> tuple[int, ...]:
        ended = record.finish_reason not in ("length", "abort")
        if self._known(ids := tuple(record.answer_ids), own):
            return ids
        answer = with_arguments(record.answer or {})
        if record.messages:
            messages = [with_arguments(m) for m in record.messages]
            found = render_answer(
                self._tokenizer,
                messages,
                answer,
                record.tools,
                record.template_kwargs,
                ends=self._ends,
                ended=ended,
            )
        else:
            found = self._tokenizer(str(answer.get("content") or ""), add_special_tokens=False)["input_ids"]
            found += sorted(self._ends)[:1] if ended and found else []
        # Where the log does not say why the answer ended: at its limit it was cut off, and the end is not the model's.
        if not record.finish_reason and record.max_tokens and len(found) > record.max_tokens:
            found = found[: record.max_tokens]
        return tuple(found)


def _short(error: RequestRefused) -> str:
    """A template's own message may quote what it was given: only what is ours is kept."""
    return str(error).partition(":")[0]
