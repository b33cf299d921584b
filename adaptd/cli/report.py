"""`adaptd report`: ask the running daemon for a period, write page and figures."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from adaptd.cli.common import ConfigFile, JsonFile, Sets, load_config, since_moment, write_result


class Baseline(StrEnum):
    """What the end of a period is compared with."""

    first = "first"
    day0 = "day0"


def report(
    since: Annotated[
        str, typer.Option(help="Beginning of the period: an age such as 6h, 7d, 2w, or an ISO date.")
    ] = "7d",
    out: Annotated[Path, typer.Option(help="Folder for page and figures.")] = Path("adaptd-report"),
    baseline: Annotated[
        Baseline,
        typer.Option(
            help="Compare the last third with the first, or what serves now with what served before version 1."
        ),
    ] = Baseline.first,
    traces: Annotated[
        int, typer.Option(min=1, max=4000, help="Traces read of each stratum of the replay buffer, for tokens.")
    ] = 400,
    result: JsonFile = None,
    config: ConfigFile = None,
    sets: Sets = None,
) -> None:
    """Write a page about a period: acceptance over time, by depth, target entropy and token group, rejected tokens."""
    since_moment(since)
    settings = load_config(config, sets)
    from adaptd.cli.status import fetch

    params = {"since": since, "baseline": baseline.value, "traces": str(traces)}
    found = fetch(settings, "/adaptd/report", timeout_s=120.0, **params)
    from adaptd.report.period import period_report

    out.mkdir(parents=True, exist_ok=True)
    typer.echo("wrote " + ", ".join(str(path) for path in period_report(found, out)))
    if result is not None:
        write_result(result, found, settings)
