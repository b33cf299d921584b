"""Edits of JSON text that leave every other byte as it was: order, spacing, number formats, escapes.

Parsing and writing again would change a client's bytes (1e-05 or 0.00001, \\u00e9 or é). So an object is walked member by
member, whatever is not looked at is skipped by the C scanner of the standard library, and edits are spans of the text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

_SPACE = re.compile(r"[ \t\n\r]*")
_scan = json.JSONDecoder().scan_once  # type: ignore[attr-defined]
_scan_string = json.decoder.scanstring  # type: ignore[attr-defined]


class NotJson(ValueError):
    """The text is not the JSON that was expected."""


class Edit(NamedTuple):
    """Replace text[start:end]."""

    start: int
    end: int
    text: str


#: Called with (key, start of the value); returns where the value ends.
Visitor = Callable[[str, int], int]


def value_at(text: str, at: int) -> tuple[Any, int]:
    """The value that starts at `at`, and where it ends.

    Raises:
      NotJson: there is none.
    """
    try:
        value, end = _scan(text, at)
    except (StopIteration, ValueError) as error:
        raise NotJson(f"no JSON value at character {at}") from error
    return value, end


def skip_space(text: str, at: int) -> int:
    """The first position from `at` on that is not white space."""
    found = _SPACE.match(text, at)
    return found.end() if found else at


def walk_object(text: str, at: int, visit: Visitor) -> int:
    """Visit the members of the object that starts at `at`; returns its end, behind the closing brace.

    Raises:
      NotJson: no object starts there, or it is malformed.
    """
    at = _expect(text, at, "{")
    if text[at : at + 1] == "}":
        return at + 1
    while True:
        if text[at : at + 1] != '"':
            raise NotJson(f"no key at character {at}")
        try:
            key, at = _scan_string(text, at + 1, True)
        except ValueError as error:
            raise NotJson(f"no key at character {at}") from error
        at = _expect(text, skip_space(text, at), ":")
        at = skip_space(text, visit(key, at))
        if text[at : at + 1] == "}":
            return at + 1
        at = _expect(text, at, ",")


def walk_array(text: str, at: int, visit: Callable[[int], int]) -> int:
    """Visit the elements of the array that starts at `at`; returns its end, behind the closing bracket.

    Raises:
      NotJson: no array starts there, or it is malformed.
    """
    at = _expect(text, at, "[")
    if text[at : at + 1] == "]":
        return at + 1
    while True:
        at = skip_space(text, visit(at))
        if text[at : at + 1] == "]":
            return at + 1
        at = _expect(text, at, ",")


def _expect(text: str, at: int, character: str) -> int:
    if text[at : at + 1] != character:
        raise NotJson(f"no {character!r} at character {at}")
    return skip_space(text, at + 1)


def apply(text: str, edits: Iterable[Edit]) -> str:
    """The text with all edits made; they must not overlap."""
    parts: list[str] = []
    at = 0
    for edit in sorted(edits):
        parts += (text[at : edit.start], edit.text)
        at = edit.end
    parts.append(text[at:])
    return "".join(parts)


def set_members(text: str, values: dict[str, Any]) -> str:
    """The object `text` with these members set: in place where the key is there (every time it is), else at its end.

    Raises:
      NotJson: the text is not one object.
    """
    edits: list[Edit] = []
    missing = dict(values)
    count = 0

    def visit(key: str, at: int) -> int:
        nonlocal count
        count += 1
        _, end = value_at(text, at)
        if key in values:
            edits.append(Edit(at, end, json.dumps(values[key])))
            missing.pop(key, None)
        return end

    end = walk_object(text, skip_space(text, 0), visit)
    if skip_space(text, end) != len(text):
        raise NotJson(f"more text behind the object at character {end}")
    if missing:
        added = ",".join(f"{json.dumps(key)}:{json.dumps(value)}" for key, value in missing.items())
        edits.append(Edit(end - 1, end - 1, f",{added}" if count else added))
    return apply(text, edits)
