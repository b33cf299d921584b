"""structlog set-up: coloured lines on a terminal, one JSON object a line otherwise, always to stderr."""

from __future__ import annotations

import logging
import sys
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


def logger(name: str) -> structlog.typing.FilteringBoundLogger:
    """The logger of one module."""
    bound: structlog.typing.FilteringBoundLogger = structlog.get_logger(module=name)
    return bound
