"""Raw values, before they are checked: a YAML file, text as a value, where a dotted key puts it; an age or a time."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from adaptd.errors import ConfigError

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 7 * 86400.0}


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping of sections that a YAML file holds; an empty file is an empty one.

    Raises:
      ConfigError: the file cannot be read, or is not such a mapping.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"configuration file {path} cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"configuration file {path} is not valid YAML: {error}") from error
    if not isinstance(values or {}, dict):
        raise ConfigError(f"configuration file {path} must hold a mapping of sections")
    return dict(values or {})


def value_of(text: str) -> Any:
    """The text read as YAML, or as it is where it is not YAML."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    # YAML reads 1e-3 as a string; pydantic turns it into a float where one is wanted.
    return value


def put(values: dict[str, Any], parts: list[str], text: str, origin: str) -> None:
    """Set the key of these parts in `values`, in place; sections on the way are copied, not changed.

    Raises:
      ConfigError: a part on the way is a value; the message begins with `origin`.
    """
    node = values
    for part in parts[:-1]:
        inner = node.get(part, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{origin}: {part!r} is a value, not a section")
        node[part] = inner = dict(inner)
        node = inner
    node[parts[-1]] = value_of(text)


def moment(text: str, now: float) -> float:
    """Unix seconds of an age before `now` (90s, 15m, 6h, 7d, 2w) or of an ISO date or time, UTC where it names no zone.

    Raises:
      ValueError: it is neither, or not before `now`; the message is a whole sentence.
    """
    if age := re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", text.strip()):
        at = now - float(age[1]) * _UNITS[age[2]]
    else:
        try:
            when = datetime.fromisoformat(text.strip())
            at = (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()
        except (ValueError, OverflowError):
            raise ValueError(
                f"since ({text!r}) must be an age such as 7d (90s, 15m, 6h, 2w) or an ISO date or time (2026-01-31)"
            ) from None
    if at >= now:
        raise ValueError(f"since ({text!r}) must lie in the past")
    return at
