"""`adaptd replay`: what the command line says, made into options."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from adaptd.cli.common import ConfigFile, JsonFile, Sets, load_config, since_moment, write_result


class Teacher(StrEnum):
    """Who judges an answer."""

    TARGET = "target"
    REGENERATE = "regenerate"
    BLACK_BOX = "black-box"
    AUTO = "auto"


class Selection(StrEnum):
    """How a budget is spent."""

    SHIFT = "shift"
    SURPRISE = "surprise"
    RANDOM = "random"


def replay(
    paths: Annotated[
        list[str], typer.Argument(metavar="PATH", help="Logs: files, globs, folders; - is standard input.")
    ],
    columns: Annotated[
        list[str] | None,
        typer.Option(
            "--map",
            metavar="NAME=COLUMN",
            help="Columns of any other table: prompt, response, messages, system, model, time, domain, id.",
        ),
    ] = None,
    teacher: Annotated[
        Teacher,
        typer.Option(
            help="target: judge recorded answers of the target; regenerate; black-box; auto: decided for each record."
        ),
    ] = Teacher.TARGET,
    regenerate: Annotated[bool, typer.Option("--regenerate", help="The target answers every question again.")] = False,
    black_box: Annotated[
        bool, typer.Option("--black-box", help="Learn from recorded answers without a target: hard labels.")
    ] = False,
    served_as: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Name of the target in the log; may be repeated.")
    ] = None,
    assume_target: Annotated[
        bool, typer.Option("--assume-target", help="Answers whose writer the log does not name are the target's.")
    ] = False,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="Of requests that name none.", show_default="upstream.temperature")
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="Longest answer given anew, where the request sets no limit.")
    ] = 256,
    limit: Annotated[int | None, typer.Option(min=1, help="Stop reading after so many usable records.")] = None,
    since: Annotated[str | None, typer.Option(help="Leave out what is older: 7d, 12h, or an ISO time.")] = None,
    sample: Annotated[
        float | None, typer.Option(min=0.0, help="Below 1 a share, else a number of records, chosen uniformly.")
    ] = None,
    domain_field: Annotated[
        str | None, typer.Option(metavar="PATH", help="Field that names the domain, e.g. metadata.team.")
    ] = None,
    budget: Annotated[int | None, typer.Option(min=1, help="Replay only the so many most valuable records.")] = None,
    select: Annotated[
        Selection, typer.Option(help="What makes a record valuable: representation shift, SurpriseRatio, chance.")
    ] = Selection.SHIFT,
    holdout: Annotated[
        float,
        typer.Option(min=0.0, max=0.5, help="Share of the records that figures are measured on, never learned from."),
    ] = 0.1,
    oracle: Annotated[
        bool, typer.Option("--oracle", help="Also train a draft on everything at once, and compare.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what adaptd would give; the deployment stays as it is.")
    ] = False,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out and count what cannot be read.")] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Begin again, though an interrupted replay could go on.")
    ] = False,
    report: Annotated[Path, typer.Option(help="Folder for figure, page and log.")] = Path("adaptd-replay"),
    result: JsonFile = None,
    config: ConfigFile = None,
    sets: Sets = None,
) -> None:
    """Fit the draft to logged traffic before the first live request, and say what it gains. The daemon must be stopped."""
    wanted = _teacher(teacher, regenerate, black_box)
    when = since_moment(since)
    if sample is not None and (sample == 0 or (sample > 1 and sample != int(sample))):
        raise typer.BadParameter(f"--sample ({sample}) must be a share below 1 or a whole number of records")
    settings = load_config(config, sets)
    from adaptd.ingest.read import Reading, parse_map

    reading = Reading(parse_map(columns or []), domain_field=domain_field, skip_bad=skip_bad)
    from adaptd.app.replay.lessons import TeachingOptions
    from adaptd.app.replay.options import ReplayOptions
    from adaptd.app.replay.run import run

    options = ReplayOptions(
        reading=reading,
        teaching=TeachingOptions(
            wanted=wanted,
            names=(settings.target.model, settings.server.model, *(served_as or ())),
            assume_target=assume_target,
            temperature=settings.upstream.temperature if temperature is None else temperature,
            max_tokens=max_tokens,
        ),
        limit=limit,
        since=when,
        since_said=since,
        sample=sample,
        budget=budget,
        select=select.value,
        holdout=holdout,
        oracle=oracle,
        dry_run=dry_run,
        fresh=fresh,
    )
    found: dict[str, Any] = run(settings, paths, options, report)
    if result is not None:
        write_result(result, found, settings)


def _teacher(teacher: Teacher, regenerate: bool, black_box: bool) -> Any:
    """`--regenerate` and `--black-box` are short for `--teacher`."""
    if regenerate and black_box:
        raise typer.BadParameter("--regenerate and --black-box are two teachers: choose one")
    short = "regenerate" if regenerate else "black-box" if black_box else None
    if short and teacher.value not in ("target", short):
        raise typer.BadParameter(f"--{short} and --teacher {teacher.value} are two teachers: choose one")
    return short or teacher.value
