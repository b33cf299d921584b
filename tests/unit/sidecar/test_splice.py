"""Edits of JSON text: only the edited spans change."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptd.sidecar.splice import Edit, NotJson, apply, set_members, walk_object

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), VALUES, max_size=5), st.dictionaries(st.text(), VALUES, max_size=3))
def test_members_are_set_and_the_rest_is_as_it_was(found: dict[str, object], values: dict[str, object]) -> None:
    for indent in (None, 2):
        text = json.dumps(found, indent=indent, ensure_ascii=False)
        assert json.loads(set_members(text, values)) == {**found, **values}
        assert set_members(text, {}) == text


def test_numbers_escapes_and_spacing_stay() -> None:
    text = ' { "a" : 1.50e-07 ,\n"b":"\\u00e9\\/", "stream":false}\n'
    assert set_members(text, {"stream": True, "n": 1}) == (
        ' { "a" : 1.50e-07 ,\n"b":"\\u00e9\\/", "stream":true,"n":1}\n'
    )


def test_a_key_that_is_there_twice_is_set_twice() -> None:
    assert set_members('{"a":1,"a":2}', {"a": 3}) == '{"a":3,"a":3}'


def test_an_empty_object_gets_no_comma() -> None:
    assert set_members("{}", {"a": 1}) == '{"a":1}'


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"a"}', '{"a":}', '{"a":1,}', '{"a":1} x', "{'a':1}", '{"a":1 "b":2}']
)
def test_what_is_no_object_is_refused(text: str) -> None:
    with pytest.raises(NotJson):
        set_members(text, {"b": 1})


def test_walking_visits_only_the_top() -> None:
    seen = []
    text = '{"a":{"x":1},"b":[{"y":2}]}'

    def visit(key: str, at: int) -> int:
        seen.append(key)
        return json.JSONDecoder().raw_decode(text, at)[1]

    assert walk_object(text, 0, visit) == len(text)
    assert seen == ["a", "b"]


def test_edits_apply_in_order_of_place() -> None:
    assert apply("abcdef", [Edit(4, 5, "Y"), Edit(0, 1, "X"), Edit(2, 2, "-")]) == "Xb-cdYf"
