"""`adaptd`: serve, look, replay logs, evaluate, manage checkpoints, check the installation, see the demonstration.

Exit codes: 0 ok, 1 failure, 2 usage, 69 upstream unavailable, 75 try again, 78 bad configuration.
"""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from adaptd import __version__
from adaptd.cli import bench, checkpoints, replay, report, synthesize
from adaptd.cli.common import ConfigFile, JsonFile, JsonFlag, Sets, load_config, print_json, write_result
from adaptd.errors import AdaptdError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Keep the draft model of a speculative-decoding deployment in tune with its live traffic.",
)
app.add_typer(bench.app, name="bench", help="Measure learners side by side.")
app.add_typer(checkpoints.app, name="checkpoints", help="List, show, promote and roll back draft versions.")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"adaptd {__version__}")
        raise typer.Exit


class EngineKind(StrEnum):
    """Who decodes in the demonstration."""

    native = "native"
    vllm = "vllm"


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Keep the draft model of a speculative-decoding deployment in tune with its live traffic."""


@app.command()
def serve(
    config: ConfigFile = None,
    sets: Sets = None,
    dry_run: Annotated[bool, typer.Option(help="Print the resolved configuration and exit.")] = False,
) -> None:
    """Serve the OpenAI-compatible API and adapt the draft to what it sees."""
    settings = load_config(config, sets)
    if dry_run:
        print_json(settings.model_dump(mode="json"))
        return
    from adaptd.app.serve import run

    run(settings)


@app.command()
def status(
    config: ConfigFile = None,
    sets: Sets = None,
    as_json: JsonFlag = False,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Redraw every two seconds until interrupted.")] = False,
    since: Annotated[
        str | None, typer.Option(help="Add the trends since then: an age such as 90s, 15m, 6h, 7d, 2w, or an ISO date.")
    ] = None,
) -> None:
    """Show acceptance, drift, learner, buffer and swaps of the running daemon; with --since also how they came about."""
    from adaptd.cli.status import show

    show(load_config(config, sets), as_json=as_json, watch=watch, since=since)


@app.command("eval")
def evaluate(
    prompts: Annotated[Path, typer.Argument(help="JSON Lines with `prompt` and optionally `domain`; .gz accepted.")],
    config: ConfigFile = None,
    sets: Sets = None,
    version: Annotated[int | None, typer.Option(help="Draft version; 0 is day 0.", show_default="the live one")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="First N prompts only.")] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 decodes greedily.")] = 0.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 64,
    result: JsonFile = None,
) -> None:
    """Measure MAL and token acceptance of a draft version, by depth and by domain, by real decoding."""
    settings = load_config(config, sets)
    from adaptd.app.evaluate import run
    from adaptd.report.tables import evaluation_table, show

    found = run(settings, prompts, version=version, limit=limit, temperature=temperature, max_tokens=max_tokens)
    show(evaluation_table(found))
    if result is not None:
        write_result(result, found, settings)


app.command()(report.report)
app.command()(replay.replay)
app.command()(synthesize.synthesize)


@app.command()
def doctor(config: ConfigFile = None, sets: Sets = None, as_json: JsonFlag = False) -> None:
    """Check models, vocabulary, template, disk, Redis, Ray and GPU memory, each with its remedy."""
    settings = load_config(config, sets)
    from adaptd.app.doctor import run
    from adaptd.report.tables import doctor_table, show

    checks = run(settings)
    if as_json:
        print_json([check._asdict() for check in checks])
    else:
        show(doctor_table(checks))
    if any(check.state == "failed" for check in checks):
        raise typer.Exit(1)


@app.command()
def export(
    where: Annotated[list[str], typer.Argument(metavar="[VERSION] OUT", help="Version (the live one), new folder.")],
    prepare: Annotated[
        bool, typer.Option("--prepare", help="Day 0, widened and untied: what a vLLM server starts with.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16; auto: as the base on disk.")] = "auto",
    as_json: JsonFlag = False,
    config: ConfigFile = None,
    sets: Sets = None,
) -> None:
    """Write a draft version as a plain Hugging Face folder, for any engine to load."""
    version, out = export_arguments(where, prepare)
    settings = load_config(config, sets)
    from adaptd.app.export import run

    found = run(settings, out, version=version, prepare=prepare, dtype=dtype)
    if as_json:
        print_json(found)
        return
    kind = "the prepared day-0 draft" if prepare else f"version {found['version']}"
    typer.echo(f"{kind} is in {found['path']}: {found['parameters']:,} parameters")


def export_arguments(where: list[str], prepare: bool) -> tuple[int | None, Path]:
    """Version and folder of `adaptd export [VERSION] OUT`; one argument is the folder."""
    if len(where) > 2:
        raise typer.BadParameter(f"expected [VERSION] OUT, got {len(where)} arguments")
    if len(where) == 1:
        return None, Path(where[0])
    if not where[0].isdecimal():
        raise typer.BadParameter(f"version ({where[0]!r}) must be a number; 0 is day 0")
    if prepare:
        raise typer.BadParameter("--prepare writes day 0: leave the version out")
    return int(where[0]), Path(where[1])


@app.command()
def demo(
    quick: Annotated[
        bool, typer.Option("--quick", help="A shorter run; with the native engine under 90 seconds.")
    ] = False,
    engine: Annotated[
        EngineKind, typer.Option(help="Who decodes: adaptd's own engine, or a vLLM server that is started for it.")
    ] = EngineKind.native,
    vllm: Annotated[
        Path | None,
        typer.Option(
            envvar="ADAPTD_VLLM",
            help="With --engine vllm: a virtual environment that has vLLM, or its executable.",
            show_default=".vllm here, or vllm on the PATH",
        ),
    ] = None,
    result: JsonFile = None,
    report: Annotated[
        Path, typer.Option(help="Folder for the PNG and HTML report; with --engine vllm for the logs.")
    ] = Path("adaptd-demo"),
    config: ConfigFile = None,
    sets: Sets = None,
) -> None:
    """Watch the shipped draft lose acceptance when traffic changes, and win it back by itself."""
    if engine is EngineKind.vllm:
        from adaptd.app import demo_vllm

        settings = demo_vllm.settings_for(config, sets)
        found = demo_vllm.run(settings, vllm=vllm, quick=quick, report=report)
    else:
        from adaptd.app import demo as native

        settings = native.settings_for(config, sets)
        found = native.run(settings, quick=quick, report=report)
    if result is not None:
        write_result(result, found, settings)


def main() -> None:
    """Run the command line; expected errors are one line on standard error and their exit code."""
    try:
        app()
    except AdaptdError as error:
        typer.echo(f"adaptd: {error}", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
