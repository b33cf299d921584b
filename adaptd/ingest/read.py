"""Logs to records, one after the other: what every format has in common once its rows are known."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from adaptd.errors import LogRefused
from adaptd.ingest.fields import NotText, dig
from adaptd.ingest.files import open_log, position
from adaptd.ingest.formats.plain import MAPPED, Mapped
from adaptd.ingest.record import NO_CONTENT, Half, Item, Record, Refused
from adaptd.ingest.rows import BadRow, rows
from adaptd.ingest.sniff import Format, sniff, unknown

#: Rows without message content after which a file that has given nothing else is refused.
_PATIENCE = 1000


@dataclass(frozen=True, slots=True)
class Reading:
    """How logs are to be read."""

    columns: Mapping[str, str] = field(default_factory=dict)
    """Of `--map`: our name -> column."""
    domain_field: str | None = None
    """Dotted path of the value that names a record's domain."""
    skip_bad: bool = False
    """Whether what cannot be read is left out and counted, in the place of a refusal."""


class Place(NamedTuple):
    """Where something stands; `number` is a line, an element of an array or a row, from 1."""

    file: str
    number: int

    def __str__(self) -> str:
        """For people."""
        return f"{self.file}, line {self.number}"


class Found(NamedTuple):
    """What a row held."""

    place: Place
    format: str
    item: Item


def read_log(
    name: str, how: Reading, *, skip: int = 0, progress: Callable[[int], None] = lambda _: None
) -> Iterator[Found]:
    """Everything in one file.

    Args:
      skip: rows that were read before; they are passed over.
      progress: told the bytes of the file that have been read.

    Raises:
      LogRefused: the file, or with `how.skip_bad` nothing in it, can be read.
    """
    opened = open_log(name)
    likely: Format | None = Mapped(how.columns) if how.columns else None
    useful = bare = 0
    first_bare = 0
    try:
        for row in rows(opened):
            if isinstance(row, BadRow):
                if row.number <= skip:
                    continue
                if not how.skip_bad:
                    raise _bad(name, row)
                yield Found(Place(name, row.number), "", Refused(row.rule))
                continue
            number, content = row
            if number <= skip:
                useful += 1  # what was read before was in order
                continue
            place = Place(name, number)
            found = likely if how.columns and likely and likely.matches(content) else None
            found = found or (None if how.columns else sniff(content, likely))
            if found is None:
                rule = _unmapped(how.columns) if how.columns else unknown(content)
                if not how.skip_bad:
                    raise LogRefused(f"{place}: {rule}")
                yield Found(place, "", Refused("of no known format"))
                continue
            likely = found
            for item in _items(found, content, how):
                useful += isinstance(item, Half | Record)
                if item == NO_CONTENT:
                    bare, first_bare = bare + 1, first_bare or number
                yield Found(place, found.NAME, item)
            if bare >= _PATIENCE and not useful:
                break
            progress(position(opened))
    finally:
        if name != "-":
            opened.raw.close()
    if bare and not useful and not how.skip_bad:
        raise LogRefused(
            f"{name}, line {first_bare}: the log ({likely.NAME if likely else 'unknown'}) has no message content: "
            "switch content capture on where it is written, and log again"
        )


def _items(found: Format, content: Mapping[str, Any], how: Reading) -> Iterator[Item]:
    try:
        for item in found.read(content):
            if how.domain_field is None or not isinstance(item, Record | Half):
                yield item
                continue
            value = dig(content, how.domain_field)
            domain = "" if value is None else str(value)
            if isinstance(item, Record):
                yield replace(item, domain=domain or item.domain)
            else:
                yield replace(item, records=[replace(r, domain=domain or r.domain) for r in item.records])
    except NotText:
        yield Refused("content that is not text")
    except (TypeError, KeyError, AttributeError, ValueError, IndexError):
        # A value of another type than the layout has: the row's fault, not the file's.
        yield Refused("a field of an unexpected type")


def _unmapped(columns: Mapping[str, str]) -> str:
    asked = columns.get("messages") or columns.get("prompt", "prompt")
    return f"has no column {asked!r}, which --map names: name one that is there"


def _bad(name: str, row: BadRow) -> LogRefused:
    cut = "copy the file again, or pass --skip-bad to use what can be read"
    remedy = cut if row.last else "correct it, or pass --skip-bad to leave it out"
    return LogRefused(f"{Place(name, row.number)}: {row.rule}: {remedy}")


def unusable(record: Record, *, since: float | None, need_answer: bool) -> str:
    """Why a whole record is not replayed, in a few words; empty if it is.

    Args:
      since: unix seconds before which records are left out; None: no such time.
      need_answer: whether a question alone is of no use.
    """
    if record.cached:
        return "answered from a cache"
    if record.error:
        return f"failed: {record.error}"
    if not record.asks():
        return NO_CONTENT.reason
    if need_answer and not record.answers():
        return "no answer"
    if since is not None and math.isnan(record.at):
        return "no time, and --since was given"
    if since is not None and record.at < since:
        return "before --since"
    return ""


def parse_map(items: Sequence[str]) -> dict[str, str]:
    """`name=column` pairs of `--map`.

    Raises:
      LogRefused: another form, or a name that is not ours.
    """
    found: dict[str, str] = {}
    for item in items:
        name, equals, column = item.partition("=")
        name = {"completion": "response", "answer": "response", "timestamp": "time"}.get(name.strip(), name.strip())
        if not equals or not column or name not in MAPPED:
            raise LogRefused(f"--map {item!r} must be NAME=COLUMN, with NAME one of: {', '.join(MAPPED)}")
        found[name] = column.strip()
    if found and not found.keys() & {"prompt", "messages"}:
        raise LogRefused("--map must name the question: prompt=COLUMN or messages=COLUMN")
    return found
