"""Which group a token belongs to."""

import numpy as np
import pytest

from adaptd.report.token_groups import RULES, TokenGroups

EXAMPLES = {
    "whitespace": [" ", "\n\n", "\t"],
    "numerals": ["7", " 12", "3.14", "50%", "1,000"],
    "operators": ["=", " +", "==", "×", "/"],
    "function words": [" the", "The", " of", "which", " not"],
    "punctuation": [".", ",", '."', "?!", "—", ")", "("],
    "code symbols": ["{", "}\n", "->{", "[]", "_", "});", "::{", "\\"],
    "other": ["apple", " Let", "x1", "漢", "", "theory"],
}


def group_of(texts: list[str], own: dict[str, str] | None = None) -> list[str]:
    groups = TokenGroups(lambda ids: [texts[i] for i in ids], own or {})
    return [groups.names[i] for i in groups.of(np.arange(len(texts)))]


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_token_is_in_its_group(name: str) -> None:
    assert set(EXAMPLES) == {*RULES, "other"}
    found = dict(zip(EXAMPLES[name], group_of(EXAMPLES[name]), strict=True))
    assert found == dict.fromkeys(EXAMPLES[name], name)


def test_own_groups_come_first_and_may_replace_a_built_in_one() -> None:
    own = {"units": "kg|cm", "numerals": "[0-9]|one|two"}
    assert group_of([" kg", "two", "12", "the"], own) == ["units", "numerals", "other", "function words"]


def test_a_token_is_looked_up_once() -> None:
    asked: list[int] = []

    def texts(ids: list[int]) -> list[str]:
        asked.extend(ids)
        return ["the" for _ in ids]

    groups = TokenGroups(texts, {})  # type: ignore[arg-type]
    groups.of(np.array([5, 5, 9], np.uint32))
    assert groups.of(np.array([9, 5, 5, 9], np.uint32)).tolist() == [groups.names.index("function words")] * 4
    assert sorted(asked) == [5, 9]
