"""Options and output shared by all commands. Imports nothing heavy: `adaptd --help` must answer at once."""

from __future__ import annotations

import json
import os
import platform
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from adaptd.config import Config

ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config", "-c", help="YAML configuration file.", show_default="built-in defaults", envvar="ADAPTD_CONFIG"
    ),
]
Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override one setting; may be repeated.")
]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the result to this file.")]


def load_config(path: Path | None, sets: list[str] | None) -> Config:
    """The configuration of this invocation: file, environment, `--set`."""
    from adaptd import config

    return config.load(path, sets or (), dict(os.environ))


def since_moment(text: str | None) -> float | None:
    """Unix seconds that `--since` means.

    Raises:
      BadParameter: it is neither an age nor a time, or not in the past.
    """
    if text is None:
        return None
    from adaptd.values import moment

    try:
        return moment(text, time.time())
    except ValueError as error:
        raise typer.BadParameter(f"--{error}") from None


def machine() -> dict[str, Any]:
    """The machine of a result file."""
    return {"python": platform.python_version(), "system": platform.platform(), "cpus": os.cpu_count()}


def write_result(path: Path, result: dict[str, Any], config: Config) -> None:
    """Write a result file with the keys that every one carries."""
    from adaptd import __version__

    head = {
        "adaptd_version": __version__,
        "config": config.model_dump(mode="json"),
        "seed": config.seed,
        "machine": machine(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(head | result, indent=2) + "\n", encoding="utf-8")


def print_json(value: Any) -> None:
    """Print JSON to standard output."""
    typer.echo(json.dumps(value, indent=2))
