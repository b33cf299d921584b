"""Records to tokens with a template: what the target saw, and what it would have decoded."""

import copy
from typing import Any

import pytest

from adaptd.errors import RequestRefused
from adaptd.ingest.record import Record
from adaptd.ingest.render import Renderer, Unrenderable
from adaptd.models import load
from adaptd.models.chat import render_answer, render_chat

ASKED = ({"role": "user", "content": "2 + 2?"},)
FOUR = {"role": "assistant", "content": "4"}
TOOLS_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.tool_calls %}"
    "{% for c in m.tool_calls %}CALL {{ c.function.name }} {{ c.function.arguments | tojson }}{% endfor %}"
    "{% else %}{{ m.content }}{% endif %}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if thinking is defined %}{{ thinking }}{% endif %}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load.load_tokenizer(load.resolve("pocket", "target"))


@pytest.fixture
def calling(tokenizer: Any) -> Any:
    other = copy.deepcopy(tokenizer)
    other.chat_template = TOOLS_TEMPLATE
    return other


def renderer(tokenizer: Any, max_length: int = 64) -> Renderer:
    return Renderer(tokenizer, ends={tokenizer.eos_token_id}, vocab=4096, max_length=max_length)


def test_prompt_and_answer_are_what_the_template_writes(tokenizer: Any) -> None:
    found = renderer(tokenizer).render(Record(messages=ASKED, answer=FOUR), own=True, with_answer=True)
    assert list(found.prompt) == render_chat(tokenizer, ASKED)
    assert tokenizer.decode(found.answer) == "4<|end|>"


def test_an_answer_that_was_cut_off_has_no_end(tokenizer: Any) -> None:
    record = Record(messages=ASKED, answer=FOUR, finish_reason="length")
    assert tokenizer.decode(renderer(tokenizer).render(record, own=True, with_answer=True).answer) == "4"
    # Not said, but as long as it was allowed to be.
    record = Record(messages=ASKED, answer=FOUR, max_tokens=1)
    assert tokenizer.decode(renderer(tokenizer).render(record, own=True, with_answer=True).answer) == "4"


def test_what_the_template_writes_behind_the_end_is_not_the_models(calling: Any) -> None:
    ids = render_answer(calling, ASKED, FOUR, ends={calling.eos_token_id})
    assert calling.decode(ids) == "4<|end|>"


def test_tool_calls_are_rendered_as_the_template_writes_them(calling: Any) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
    record = Record(messages=ASKED, answer={"role": "assistant", "content": "", "tool_calls": [call]})
    found = renderer(calling).render(record, own=True, with_answer=True)
    assert calling.decode(found.answer) == 'CALL add {"a": 2}<|end|>'


def test_template_arguments_of_the_request_are_used(calling: Any) -> None:
    record = Record(messages=ASKED, answer=FOUR, template_kwargs={"thinking": "hm "})
    found = renderer(calling).render(record, own=True, with_answer=True)
    assert calling.decode(found.prompt).endswith("hm ")
    # The template does not repeat the opening in front of an answer: the text alone is what the model gave.
    assert calling.decode(found.answer) == "4<|end|>"
    calls = {**FOUR, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    with pytest.raises(RequestRefused, match="tool calls"):
        render_answer(calling, ASKED, calls, template_kwargs={"thinking": "hm "}, ends={2})


def test_logged_token_ids_are_used_where_the_target_wrote_them(tokenizer: Any) -> None:
    record = Record(messages=ASKED, answer=FOUR, prompt_ids=(1, 7, 8), answer_ids=(9, 2))
    own = renderer(tokenizer).render(record, own=True, with_answer=True)
    assert (own.prompt, own.answer) == ((1, 7, 8), (9, 2))
    other = renderer(tokenizer).render(record, own=False, with_answer=True)
    assert list(other.prompt) == render_chat(tokenizer, ASKED)


def test_a_prompt_that_a_template_rendered_is_not_begun_twice(tokenizer: Any) -> None:
    text = tokenizer.decode(render_chat(tokenizer, ASKED))
    found = renderer(tokenizer).render(Record(prompt=text, answer=FOUR), own=True, with_answer=True)
    assert list(found.prompt) == render_chat(tokenizer, ASKED)


def test_what_has_no_room_is_refused_or_cut(tokenizer: Any) -> None:
    long = Record(messages=ASKED, answer={"role": "assistant", "content": "4 " * 80})
    found = renderer(tokenizer).render(long, own=True, with_answer=True)
    assert len(found.prompt) + len(found.answer) == 64
    with pytest.raises(Unrenderable, match=r"engine\.max_length"):
        renderer(tokenizer, max_length=4).render(long, own=True, with_answer=True)


def test_a_refusing_template_is_a_reason_without_the_text_it_refused(tokenizer: Any) -> None:
    other = copy.deepcopy(tokenizer)
    other.chat_template = "{{ raise_exception('secret ' + messages[0]['content']) }}"
    with pytest.raises(Unrenderable) as refused:
        renderer(other).render(Record(messages=ASKED, answer=FOUR), own=True, with_answer=True)
    assert str(refused.value) == "the model's chat template refuses these messages"
