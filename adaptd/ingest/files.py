"""Which files are meant, and their bytes, decompressed; what must not be read is refused by its first bytes."""

from __future__ import annotations

import glob
import gzip
import io
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import zstandard

from adaptd.errors import LogRefused

_GZIP, _ZSTD, _ZIP, _PARQUET = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PK\x03\x04", b"PAR1"
_PICKLE = re.compile(rb"\x80[\x02-\x05]|\(?[ld]p\d+\s|c[\w.]+\n\w+\n")
#: Bytes looked at to tell what a file holds.
HEAD = 1 << 16
_STDIN = "-"


class Opened(NamedTuple):
    """A log that is being read."""

    name: str
    kind: str
    """`text` or `parquet`."""
    stream: io.BufferedReader
    raw: IO[bytes]
    """What `stream` is read from: its position is what of the file has been consumed."""


def expand(paths: Sequence[str]) -> list[str]:
    """Files behind paths, globs and folders, each once, in order; `-` is standard input.

    Raises:
      LogRefused: one of them names nothing.
    """
    found: dict[str, None] = {}
    for name in paths:
        path = Path(name).expanduser()
        if name == _STDIN or path.is_file() or path.is_fifo():
            files = [name if name == _STDIN else str(path)]
        elif path.is_dir():
            files = sorted(str(p) for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
        else:
            files = sorted(f for f in glob.glob(str(path), recursive=True) if Path(f).is_file())
        if not files:
            raise LogRefused(
                f"{name}: there is no such file, and nothing matches it: give a file, a glob, a folder or -"
            )
        found |= dict.fromkeys(files)
    return list(found)


def size(name: str) -> int:
    """Bytes of a file; 0 for standard input."""
    return 0 if name == _STDIN else Path(name).stat().st_size


def open_log(name: str) -> Opened:
    """Open one file, through gzip and zstandard.

    Raises:
      LogRefused: it cannot be read, is empty, or is a pickle or an archive.
    """
    try:
        raw: IO[bytes] = sys.stdin.buffer if name == _STDIN else Path(name).open("rb")  # noqa: SIM115 (closed by the reader)
    except OSError as error:
        raise LogRefused(f"{name} cannot be read: {error.strerror}") from error
    stream = _buffered(raw)
    for _ in range(3):  # compressed twice happens: an upload that was compressed again
        head = _peek(name, stream)
        if head.startswith(_GZIP):
            stream = _buffered(gzip.GzipFile(fileobj=stream))
        elif head.startswith(_ZSTD):
            stream = _buffered(_Zstd(stream))
        else:
            break
    if not head:
        raise LogRefused(f"{name} is empty: there is nothing to replay")
    if _PICKLE.match(head):
        raise LogRefused(
            f"{name} is a pickle, which can run code when it is read: it is never opened; "
            "write the log as JSON Lines instead (SGLang: --log-requests with --log-requests-format json)"
        )
    if head.startswith(_ZIP):
        raise LogRefused(f"{name} is a zip archive or a torch file: unpack it, and give the logs inside")
    return Opened(name, "parquet" if head.startswith(_PARQUET) else "text", stream, raw)


def _buffered(raw: Any) -> io.BufferedReader:
    return io.BufferedReader(raw, HEAD)


def _peek(name: str, stream: io.BufferedReader) -> bytes:
    try:
        return stream.peek(HEAD)
    except (OSError, EOFError) as error:
        raise damaged(name, error) from error


def damaged(name: str, error: Exception, where: str = "") -> LogRefused:
    """The refusal of a file whose compression is broken or cut off."""
    about = "is cut off: its compressed data ends too early" if isinstance(error, EOFError) else f"is damaged ({error})"
    return LogRefused(f"{name}{where} {about}: copy it again, or pass --skip-bad to use what can be read")


class _Zstd(io.RawIOBase):
    """zstandard that says so when the data ends in the middle of a frame."""

    def __init__(self, source: io.BufferedReader) -> None:
        self._source = source
        self._decoder: Any = None
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a part of `buffer`; 0 at the end."""
        while not self._ready:
            if self._decoder is None or self._decoder.eof:
                rest = self._decoder.unused_data if self._decoder is not None else b""
                data = rest or self._source.read1(HEAD)
                if not data:
                    return 0
                self._decoder = zstandard.ZstdDecompressor().decompressobj()
            else:
                data = self._source.read1(HEAD)
                if not data:
                    raise EOFError
            try:
                self._ready = memoryview(self._decoder.decompress(data))
            except zstandard.ZstdError as error:
                raise OSError(str(error)) from error
        n = min(len(buffer), len(self._ready))
        buffer[:n], self._ready = self._ready[:n], self._ready[n:]
        return n


def position(opened: Opened) -> int:
    """Bytes of the file that have been read so far."""
    try:
        return opened.raw.tell()
    except OSError:
        return 0
