"""`adaptd bench`: measure learners and decoders side by side."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from adaptd.cli.common import ConfigFile, JsonFile, Sets, load_config, write_result

app = typer.Typer(help="Measure learners and decoders side by side.", no_args_is_help=True)

#: `--quick`: phases of this share of their length, one seed.
_QUICK = 0.09
_LEARNERS = [
    "frozen",
    "osd",
    "aurora",
    "full_ft",
    "lora",
    "private_expert",
    "private_expert_ungated",
    "ours",
    "offline_oracle",
]


@app.callback()
def bench() -> None:
    """Measure learners and decoders side by side."""


@app.command()
def shift(
    stream: Annotated[list[str] | None, typer.Option(help="Stream, by name or YAML file; may be repeated.")] = None,
    learner: Annotated[list[str] | None, typer.Option(help="Learner, likewise; frozen and the oracle belong.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds, counted from the configuration's.")] = 3,
    scale: Annotated[float, typer.Option(min=0.01, help="Length of the phases, as a factor.")] = 1.0,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="Of every answer; not given: that of each stream.")
    ] = None,
    settle: Annotated[int, typer.Option(min=0, help="Requests of a phase left out of the settled recovery.")] = 300,
    quick: Annotated[bool, typer.Option("--quick", help="Short phases, one seed.")] = False,
    tune: Annotated[
        bool, typer.Option("--tune", help="Only choose learning rates, on a stream with its own seed.")
    ] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Processes.", show_default="processors")] = os.cpu_count() or 1,
    report: Annotated[Path, typer.Option(help="Folder for table, figures and pages.")] = Path("adaptd-shift"),
    runs: Annotated[
        Path | None, typer.Option(help="Keep finished runs in this file and do not repeat those that are in it.")
    ] = None,
    result: JsonFile = None,
    config: ConfigFile = None,
    sets: Sets = None,
) -> None:
    """Changing traffic, one target, one draft, several learners: acceptance won back, how soon, and what is forgotten."""
    settings = load_config(config, sets)
    from adaptd.app.shift import run

    found: dict[str, Any] = run(
        settings,
        streams=stream or ["sharp", "recur"],
        learners=learner or _LEARNERS,
        seeds=1 if quick else seeds,
        scale=_QUICK if quick else scale,
        temperature=temperature,
        settle=round(_QUICK * settle) if quick else settle,
        tune=tune,
        jobs=jobs,
        report=report,
        runs=runs,
    )
    if result is not None:
        write_result(result, found, settings)


@app.command()
def decode(
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Requests decoded together; may be repeated.")] = None,
    k: Annotated[
        list[int] | None, typer.Option("-k", min=1, max=16, help="Proposals a round; may be repeated.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Timed turns of every decoder, one batch each.")] = 8,
    tokens: Annotated[int, typer.Option(min=8, help="Tokens of every answer.")] = 64,
    parameters: Annotated[
        float, typer.Option(min=0, help="Size that the target is inflated to, same distribution; 0: as it is.")
    ] = 0.2e9,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads of every decoder.", show_default="processors")
    ] = None,
    vllm: Annotated[
        Path | None,
        typer.Option(
            help="Environment that has vLLM, or its executable.", show_default="`.vllm` here", envvar="ADAPTD_VLLM"
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Batch 1, one k, two rounds, short answers.")] = False,
    result: JsonFile = None,
    config: ConfigFile = None,
    sets: Sets = None,
) -> None:
    """Tokens a second of adaptd, transformers and vLLM on one pair, in turns, beside the machine's limits."""
    settings = load_config(config, sets)
    from adaptd.app.decode import run

    found: dict[str, Any] = run(
        settings,
        batches=batch or ([1] if quick else [1, 4, 16]),
        depths=k or ([settings.engine.k] if quick else [2, 4, 6, 8]),
        rounds=2 if quick else rounds,
        tokens=min(tokens, 32) if quick else tokens,
        parameters=round(parameters) or None,
        threads=threads,
        vllm=vllm,
    )
    if result is not None:
        write_result(result, found, settings)
