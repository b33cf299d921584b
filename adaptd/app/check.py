"""One line of `adaptd doctor`."""

from __future__ import annotations

from typing import Literal, NamedTuple


class Check(NamedTuple):
    """One line of the report; `remedy` is empty when `state` is ok."""

    name: str
    state: Literal["ok", "warning", "failed"]
    found: str
    remedy: str = ""
