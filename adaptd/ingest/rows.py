"""Containers to rows: JSON Lines, a JSON array or object, CSV, parquet, text. Streaming: one row in memory, or one batch."""

from __future__ import annotations

import csv
import io
import json
import zlib
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import pyarrow
import pyarrow.parquet

from adaptd.errors import LogRefused
from adaptd.ingest.fields import decoded
from adaptd.ingest.files import HEAD, Opened, damaged
from adaptd.ingest.formats.vllm_log import is_line

#: Longest line, or element of an array, in bytes: what is longer is no request.
MAX_ROW = 1 << 26
_PARQUET_ROWS = 256
#: Columns of a table whose text is never JSON: a prompt may look like it.
_TEXT = frozenset({"prompt", "completion", "response", "content", "text", "question", "answer", "instruction"})
#: Keys of an object that wraps a list of rows, as answers of an API do.
_WRAPPED = ("data", "observations", "requests", "records")

Row = tuple[int, Mapping[str, Any]]
"""Number (line, element or row, from 1) and content."""


class BadRow(ValueError):
    """A row that cannot be read: (number, rule)."""

    def __init__(self, number: int, rule: str, *, last: bool = False) -> None:
        super().__init__(number, rule)
        self.number, self.rule, self.last = number, rule, last


def rows(opened: Opened) -> Iterator[Row | BadRow]:
    """Rows of a log in order, numbered from 1; in the place of one that cannot be read its error.

    Raises:
      LogRefused: the file as a whole cannot be read, from some place on.
    """
    number = 0
    try:
        for row in _parquet(opened) if opened.kind == "parquet" else _text(opened):
            number = row[0] if isinstance(row, tuple) else row.number
            yield row
    except (EOFError, OSError, zlib.error, pyarrow.ArrowException) as error:
        raise damaged(opened.name, error, f", behind line {number}," if number else "") from error


def _text(opened: Opened) -> Iterator[Row | BadRow]:
    head = opened.stream.peek(HEAD)
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if start.startswith(b"["):
        return _elements(opened.stream)
    if start.startswith(b"{"):
        first = start.split(b"\n", 1)
        if len(first) == 1 or _is_json(first[0]) or not _opens(first[0]):
            return _json_lines(opened.stream)
        return _document(opened)
    if any(is_line(line) for line in head.decode("utf-8", "replace").splitlines()):
        return _lines(opened.stream)
    return _csv(opened.stream)


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _opens(line: bytes) -> bool:
    """Whether a first line looks like that of an indented document: it ends where a value may begin."""
    return line.rstrip()[-1:] in (b"{", b"[", b",")


def _json_lines(stream: io.BufferedReader) -> Iterator[Row | BadRow]:
    for number, line in enumerate(_raw_lines(stream), start=1):
        if not line.strip():
            continue
        if len(line) > MAX_ROW:
            raise _too_long(number)
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            last = not line.endswith(b"\n")
            rule = "the file ends in the middle of a record" if last else "is not valid JSON"
            yield BadRow(number, rule, last=last)
            continue
        yield (number, row) if isinstance(row, dict) else BadRow(number, "must be a JSON object")


def _raw_lines(stream: io.BufferedReader) -> Iterator[bytes]:
    while line := stream.readline(MAX_ROW + 1):
        yield line.removeprefix(b"\xef\xbb\xbf")


def _too_long(number: int) -> OSError:
    return OSError(f"line {number} is longer than {MAX_ROW >> 20} MiB")


def _elements(stream: io.BufferedReader) -> Iterator[Row | BadRow]:
    """Elements of a JSON array, without holding the array."""
    reader = io.TextIOWrapper(stream, encoding="utf-8-sig")
    decode = json.JSONDecoder().raw_decode
    text, at, number, wanted, ended = "", 0, 0, HEAD, False
    while True:
        while at < len(text) and text[at] in " \t\r\n,[" and (text[at] != "[" or number == 0):
            at += 1
            number = number or 1
        if at < len(text) and text[at] == "]":
            return
        try:
            row, at = decode(text, at)
        except ValueError:
            if ended:
                yield BadRow(max(number, 1), "the file ends in the middle of a record", last=True)
                return
            if len(text) - at > MAX_ROW:
                raise _too_long(number) from None
            # Twice as much each time, so that a long element is not parsed again for every few bytes.
            more = reader.read(wanted)
            text, at, ended = text[at:] + more, 0, not more
            wanted = max(HEAD, len(text))
            continue
        yield (number, row) if isinstance(row, dict) else BadRow(number, "must be a JSON object")
        number += 1
        wanted = HEAD


def _document(opened: Opened) -> Iterator[Row | BadRow]:
    """One indented object: a row, or a list of rows inside an answer of an API."""
    content = opened.stream.read(MAX_ROW + 1)
    if len(content) > MAX_ROW:
        raise LogRefused(
            f"{opened.name} is one JSON object of more than {MAX_ROW >> 20} MiB: write one object a line instead"
        )
    try:
        document = json.loads(content.removeprefix(b"\xef\xbb\xbf"))
    except ValueError as error:
        line = getattr(error, "lineno", 1)
        yield BadRow(line, "the file ends in the middle of a record, or is not valid JSON", last=True)
        return
    wrapped = next((document[n] for n in _WRAPPED if isinstance(document.get(n), list)), None)
    for number, row in enumerate([document] if wrapped is None else wrapped, start=1):
        yield (number, row) if isinstance(row, dict) else BadRow(number, "must be a JSON object")


def _lines(stream: io.BufferedReader) -> Iterator[Row]:
    for number, line in enumerate(_raw_lines(stream), start=1):
        text = line.decode("utf-8", "replace").rstrip("\r\n")
        if is_line(text):
            yield number, {"line": text}


def _csv(stream: io.BufferedReader) -> Iterator[Row | BadRow]:
    csv.field_size_limit(MAX_ROW)
    reader = csv.DictReader(io.TextIOWrapper(stream, encoding="utf-8-sig", newline=""), strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                yield BadRow(reader.line_num, "has another number of columns than the header")
                continue
            yield reader.line_num, _cells(row)
    except (csv.Error, UnicodeDecodeError):
        yield BadRow(reader.line_num + 1, "is neither JSON nor valid CSV in UTF-8", last=True)


def _parquet(opened: Opened) -> Iterator[Row]:
    if opened.name == "-" or not opened.stream.seekable():
        raise LogRefused("parquet is read from its end: save it to a file (uncompressed by gzip or zstd) and give that")
    file = pyarrow.parquet.ParquetFile(opened.stream)
    batches = (batch.to_pylist() for batch in file.iter_batches(_PARQUET_ROWS))
    for number, row in enumerate(chain.from_iterable(batches), start=1):
        yield number, _cells(row)


def _cells(row: Mapping[str, Any]) -> dict[str, Any]:
    """Cells of a table: lists and objects are written as JSON text there."""
    return {name: value if name in _TEXT else decoded(value) for name, value in row.items() if value not in (None, "")}
