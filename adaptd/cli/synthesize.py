"""`adaptd synthesize`: what the command line says, made into options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from adaptd.cli.common import ConfigFile, JsonFile, Sets, load_config, write_result


def synthesize(
    out: Annotated[Path, typer.Argument(help="New log, JSON Lines; compressed if it ends in .gz.")],
    n: Annotated[int, typer.Option("-n", "--queries", min=1, help="Queries, of each domain.")] = 1000,
    domain: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=SYSTEM PROMPT", help="Domain and the system prompt that asks for it; may be repeated."
        ),
    ] = None,
    query_temperature: Annotated[float, typer.Option(min=0.0, help="Of the queries.")] = 1.0,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="Of the answers.", show_default="upstream.temperature")
    ] = None,
    max_query: Annotated[int, typer.Option(min=4, help="Longest query, in tokens.")] = 128,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    result: JsonFile = None,
    config: ConfigFile = None,
    sets: Sets = None,
) -> None:
    """Where there are no logs: the target thinks of queries and answers them; `adaptd replay` reads what is written."""
    domains = [_domain(text) for text in domain or ()] or [("", "")]
    settings = load_config(config, sets)
    from adaptd.app.synthesize import SynthesisOptions, run

    found = run(
        settings,
        out,
        SynthesisOptions(
            n=n,
            domains=domains,
            query_temperature=query_temperature,
            temperature=settings.upstream.temperature if temperature is None else temperature,
            max_query=max_query,
            max_tokens=max_tokens,
        ),
    )
    typer.echo(f"wrote {found['queries']:,} queries and answers to {found['path']} in {found['seconds']:,.0f} s")
    for reason, count in found["refused"].items():
        typer.echo(f"left out: {count:,} {reason}")
    if result is not None:
        write_result(result, found, settings)


def _domain(text: str) -> tuple[str, str]:
    name, equals, system = text.partition("=")
    if not equals or not name.strip():
        raise typer.BadParameter(f"--domain ({text!r}) must be NAME=SYSTEM PROMPT; an empty prompt is none")
    return name.strip(), system.strip()
