"""`adaptd bench decode` from settings to a table: the inflated target, the decoders, the prompts, the result."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from adaptd.actors.parts import Pair, load_pair, placement
from adaptd.actors.threads import set_threads
from adaptd.app.vllm_process import find_vllm
from adaptd.bench import decode
from adaptd.bench.contestants import Contestant, Native, NativePlain, Prompts, Transformers, Vllm
from adaptd.bench.floor import floor_s, measure_machine
from adaptd.config import Config
from adaptd.decoding.build import build_engine
from adaptd.errors import AdaptdError, UpstreamUnavailable
from adaptd.models.chat import render_chat
from adaptd.models.inflate import save_inflated
from adaptd.models.load import load_causal_lm, resolve
from adaptd.pocket.shipped import pocket_prompts
from policies.draft_length import DraftLength

_DOMAINS = ("medical", "math", "tools", "code")


def run(
    config: Config,
    *,
    batches: Sequence[int],
    depths: Sequence[int],
    rounds: int,
    tokens: int,
    parameters: int | None,
    threads: int | None,
    vllm: Path | None,
) -> dict[str, Any]:
    """Run and print; the result in the form of design section 4 (`bench decode`).

    Args:
      parameters: size that the target is inflated to; None: as it is.
      threads: CPU threads of every decoder; None: all processors.
      vllm: environment of vLLM; None: the one that is found, or none.
    """
    console = Console()
    set_threads(threads or os.cpu_count() or 1)
    device, dtype = placement(config, 0)
    if device != "cpu":
        raise AdaptdError(f"engine.device ({device}): this benchmark times CPUs; set engine.device=cpu")
    config = _settled(config, target_folder(config, parameters, dtype), max(batches))
    plain_target = load_causal_lm(config.target.model, dtype=dtype, device=device)
    plain_draft = load_causal_lm(resolve(config.draft.model, "draft"), dtype=dtype, device=device)
    machine = measure_machine(plain_target.dtype)
    program = _vllm(vllm, console)
    rows, cells = [], []
    turns = (rounds + 1) * len(batches) * len(depths)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("decoding", total=turns * (7 if program else 6))
        for batch in batches:
            for k in depths:
                setting = config.model_copy(update={"engine": config.engine.model_copy(update={"k": k})})
                pair = load_pair(setting, 0)
                domains = _prompts(pair, setting.engine.max_length - tokens - k)
                prompts = _batches(list(domains), batch, rounds)
                with _contestants(setting, pair, plain_target, plain_draft, program, batch, dtype, domains) as found:
                    cell = decode.play(
                        found, prompts, k=k, rounds=rounds, tokens=tokens, progress=lambda: progress.advance(task)
                    )
                round_s = floor_s(machine, [(plain_target, batch * (k + 1)), *[(plain_draft, batch)] * k])
                step_s = floor_s(machine, [(plain_target, batch)])
                floors = dict.fromkeys(cell.samples.keys() - {decode.AUTO}, round_s)
                floors |= {name: step_s for name in floors if "plain" in name or name == decode.PLAIN}
                cell_rows, ratios = decode.summarise(cell, floors)
                rows += cell_rows
                cells.append({"batch": batch, "k": k, "floor_s": {"round": round_s, "step": step_s}, **ratios})
    for line in (_table(rows), *map(_line, cells)):
        console.print(line)
    about = {
        "bytes_per_s": machine.bytes_per_s,
        "flops_per_s": machine.flops_per_s,
        "threads": threads or os.cpu_count(),
    }
    head = {key: cells[0][key] for key in ("vs_transformers_assisted", "vs_transformers_plain", "vs_vllm_cpu")}
    return {"rows": rows, "ratios": head, "cells": cells, "rates": about, "dtype": dtype, "tokens": tokens}


def target_folder(config: Config, parameters: int | None, dtype: str) -> str:
    """The target, inflated once and kept in the deployment's folder."""
    source = resolve(config.target.model, "target")
    if parameters is None:
        return source
    folder = config.home / "bench" / f"target-{Path(source).name}-{parameters}-{dtype}"
    if not (folder / "tokenizer.json").exists():
        try:
            save_inflated(source, folder, parameters, dtype=dtype)
        except ValueError as error:
            raise AdaptdError(str(error)) from error
    return str(folder)


def _settled(config: Config, target: str, batch: int) -> Config:
    """What the comparison fixes: recall would know the prompts of the round before."""
    settings = config.model_dump(mode="json")
    settings["target"]["model"], settings["recall"]["enabled"] = target, False
    settings["engine"]["max_batch"] = max(batch, settings["engine"]["max_batch"])
    return type(config).model_validate(settings)


def _vllm(named: Path | None, console: Console) -> Path | None:
    try:
        return find_vllm(named).parent / "python"
    except UpstreamUnavailable as error:
        if named is not None:
            raise
        console.print(f"without vLLM: {error}", style="yellow", highlight=False)
        return None


@contextlib.contextmanager
def _contestants(
    config: Config,
    pair: Pair,
    target: Any,
    draft: Any,
    program: Path | None,
    batch: int,
    dtype: str,
    domains: Mapping[tuple[int, ...], str],
) -> Iterator[dict[str, Contestant]]:
    k, length = config.engine.k, config.engine.max_length
    engines = [
        build_engine(config, pair.target, pair.draft.model, pair.tokenizer, capture=capture, draft_length=lengths)
        for capture, lengths in ((True, None), (False, None), (True, DraftLength(k)))
    ]
    found: dict[str, Contestant] = {
        decode.OURS: Native(engines[0]),
        decode.BARE: Native(engines[1]),
        decode.AUTO: Native(engines[2], domains),
        decode.PLAIN: NativePlain(pair.target, batch=batch, max_length=length),
        "transformers plain": Transformers(target, None, k),
    }
    if batch == 1:  # transformers' assisted generation takes no more
        found["transformers assisted"] = Transformers(target, draft, k)
    try:
        if program is not None:
            found["vllm"] = Vllm(
                program,
                config.target.model,
                resolve(config.draft.model, "draft"),
                k=k,
                batch=batch,
                dtype=dtype,
                max_length=length,
                log=config.home / "bench" / "vllm.log",
            )
        yield found
    finally:
        for contestant in found.values():
            contestant.close()


def _prompts(pair: Pair, longest: int) -> dict[tuple[int, ...], str]:
    """Prompts of the four domains in turn, each with its domain."""
    by_domain = []
    for domain in _DOMAINS:
        texts = pocket_prompts(domain)
        rendered = (tuple(render_chat(pair.tokenizer, [{"role": "user", "content": text}])) for text in texts)
        by_domain.append([(ids, domain) for ids in rendered if len(ids) <= longest])
    mixed = dict(prompt for group in zip(*by_domain, strict=False) for prompt in group)
    if not mixed:
        raise AdaptdError("no prompts leave room for the answer: raise engine.max_length, or lower --tokens")
    return mixed


def _batches(prompts: Sequence[Sequence[int]], batch: int, rounds: int) -> list[Prompts]:
    """A batch for each round, in order; from the first again where they run out."""
    return [[prompts[at % len(prompts)] for at in range(r * batch, (r + 1) * batch)] for r in range(rounds)]


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table()
    for name in ("engine", "batch", "k", "tokens/s", "MAL", "times the floor", "tokens as plain"):
        table.add_column(name, justify="left" if name == "engine" else "right")
    for row in rows:
        mal, floor, same = (row[key] for key in ("mal", "floor_ratio", "same_as_plain"))
        table.add_row(
            *(row["engine"], str(row["batch"]), str(row["k"]), f"{row['tokens_per_s']:.1f}"),
            *(
                "-" if value is None else form.format(value)
                for value, form in zip((mal, floor, same), _FORMS, strict=True)
            ),
        )
    return table


_FORMS = ("{:.2f}", "{:.2f}", "{:.0%}")


def _line(cell: dict[str, Any]) -> str:
    def times(names: dict[str, str]) -> list[str]:
        found = []
        for key, name in names.items():
            if cell[key] is not None:
                low, high = cell["intervals"][key]
                found.append(f"{cell[key]:.2f} [{low:.2f}, {high:.2f}] x {name}")
        return found

    parts = times(
        {
            "vs_transformers_assisted": "transformers assisted",
            "vs_transformers_plain": "transformers plain",
            "vs_vllm_cpu": "vLLM CPU",
            "vs_capture_off": "capture off",
            "speedup": "its own plain decoding",
        }
    )
    if cell["predicted_speedup"] is not None:
        parts.append(f"predicted {cell['predicted_speedup']:.2f}")
    chosen = times({"chosen_speedup": "its own plain decoding", "chosen_vs_vllm_cpu": "vLLM CPU"})
    return (
        f"batch {cell['batch']}, k {cell['k']}: adaptd runs at {', '.join(parts)}"
        f"; with k chosen each round at {', '.join(chosen)}"
    )
