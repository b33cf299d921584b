"""The pre-query template, and what is not a query."""

import copy
from typing import Any

import pytest

from adaptd.errors import ConfigError
from adaptd.ingest.synthesize import Filters, pre_query
from adaptd.models import load


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load.load_tokenizer(load.resolve("pocket", "target"))


def test_the_template_up_to_the_users_words(tokenizer: Any) -> None:
    where = pre_query(tokenizer, "", {tokenizer.eos_token_id})
    assert tokenizer.decode(where.prompt) == "<|begin|><|user|>"
    assert where.ends == {tokenizer.eos_token_id}
    steered = pre_query(tokenizer, "You ask about maths.", {tokenizer.eos_token_id})
    assert tokenizer.decode(steered.prompt) == "<|begin|><|system|>You ask about maths.<|end|><|user|>"


def test_a_turn_that_ends_with_another_token_than_an_answer_ends_there(tokenizer: Any) -> None:
    other = copy.deepcopy(tokenizer)
    other.chat_template = "<|user|>{{ messages[-1].content }}<|assistant|>"
    assert pre_query(other, "", {2}).ends == {2, tokenizer.convert_tokens_to_ids("<|assistant|>")}


def test_a_template_that_changes_the_users_words_is_refused(tokenizer: Any) -> None:
    other = copy.deepcopy(tokenizer)
    other.chat_template = "{{ messages[-1].content | reverse | join }}"
    with pytest.raises(ConfigError, match="as they are"):
        pre_query(other, "", {2})


@pytest.mark.parametrize(
    ("ids", "text", "ended", "reason"),
    [
        (range(9), "What is asthma?", True, ""),
        (range(9), "What is asthma?", False, "--max-query"),
        (range(2), "Hm", True, "shorter"),
        (range(9), " \n ", True, "shorter"),
        ([1, 2, 3, 4] * 6, "la la la", True, "repeats"),
        (range(9), "What\x00is", True, "no text"),
    ],
)
def test_what_is_no_query_is_left_out(ids: Any, text: str, ended: bool, reason: str) -> None:
    found = Filters().refuse(list(ids), text, ended=ended)
    assert reason in found
    assert bool(reason) == bool(found)


def test_a_query_is_kept_once_whatever_its_case_and_blanks() -> None:
    filters = Filters()
    assert not filters.refuse(range(9), "What is  asthma?", ended=True)
    assert filters.refuse(range(9), "what is asthma? ", ended=True) == "a duplicate"
