"""structlog set-up: coloured lines on a terminal, one JSON object a line otherwise, always to stderr."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, TextIO

import structlog

Style = Literal["auto", "json", "console"]


def configure(level: str = "info", style: Style = "auto", stream: TextIO | None = None) -> None:
    """Configure structlog for this process.

    Args:
      level: least severe level that is written: debug, info, warning or error.
      style: `console`, `json`, or `auto`: console when the stream is a terminal.
      stream: where lines go; None is stderr.
    """
    stream = stream or sys.stderr
    console = style == "console" or (style == "auto" and stream.isatty())
    renderer = structlog.dev.ConsoleRenderer() if console else structlog.processors.JSONRenderer()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.PrintLoggerFactory(file=stream),
        cache_logger_on_first_use=False,
    )


@contextlib.contextmanager
def to_file(path: Path, level: str = "info") -> Iterator[None]:
    """Append this process's log to a file as JSON, and put everything back afterwards: progress keeps the terminal."""
    before = structlog.get_config()
    with path.open("a", encoding="utf-8") as stream:
        configure(level, "json", stream)
        try:
            yield
        finally:
            structlog.configure(**before)


def logger(name: str) -> structlog.typing.FilteringBoundLogger:
    """The logger of one module."""
    bound: structlog.typing.FilteringBoundLogger = structlog.get_logger(module=name)
    return bound
