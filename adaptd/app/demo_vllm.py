"""`adaptd demo --engine vllm`: the loop beside an unmodified vLLM server, with that server's counters as the judge.

The demonstration starts a vLLM server with the pocket pair and `adaptd serve` in front of it, asks questions through the
proxy, and reads acceptance from the server's own Prometheus counters. The frozen draft's figures are the server's too: the
same questions, asked before adaptd was there.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import yaml
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from adaptd.app import export
from adaptd.app.demo import temporary_state
from adaptd.app.demo_traffic import Leg, openai_client, send, while_waiting
from adaptd.app.state import find_daemon
from adaptd.app.vllm_process import await_health, find_vllm, plugin_folder, process, vllm_server
from adaptd.config import Config, load
from adaptd.errors import DaemonUnavailable, UpstreamUnavailable
from adaptd.models.load import resolve
from adaptd.pocket.shipped import pocket_prompts
from adaptd.report.status import render
from adaptd.report.tables import demo_table, number, spark

_MODEL = "pocket"
_WINDOW = 100
_REFRESH_S = 2.0
_WAIT_S = 300.0
#: The demonstration's settings over the defaults: a scope that a running server can take, all traffic captured, short ticks.
_SETTINGS: dict[str, dict[str, Any]] = {
    "engine": {"kind": "vllm", "max_length": 320},
    "upstream": {"capture_budget": 1.0, "poll_s": 0.5, "publish": True},
    "adapt": {"gated": False, "head_rank": 0, "embed_rank": 0},
    "capture": {"reserved_share": 0.2},
    "learn": {"interval_s": 15.0},
    "server": {"port": 0},
    "log": {"style": "json"},
}


@dataclass(frozen=True, slots=True)
class Phase:
    """Traffic of one domain: `least` requests, and more, up to `most`, until the server has had `versions` of them."""

    domain: str
    least: int
    most: int
    versions: int = 0


#: The draft knows the first domain, and not the second.
FULL = (Phase("medical", 100, 100), Phase("math", 500, 1500, versions=3))
QUICK = (Phase("medical", 30, 30), Phase("math", 250, 1200, versions=2))


def settings_for(path: Path | None, sets: list[str] | None) -> Config:
    """The demonstration's settings, overridden by file and `--set`."""
    merged = load(path, sets or ()).model_dump(exclude_unset=True)
    merged.setdefault("deployment", "demo")
    for section, values in _SETTINGS.items():
        merged[section] = {**values, **merged.get(section, {})}
    return Config(**merged)


def run(config: Config, *, vllm: Path | None, quick: bool, report: Path) -> dict[str, Any]:
    """Run the demonstration and print its table; the result in the form of design section 4 (`demo`).

    Args:
      vllm: environment or executable; None: `.vllm` here, or what is on the PATH.
      report: folder for the three logs.

    Raises:
      AdaptdError: there is no vLLM or no openai client, or one of the processes did not start.
    """
    program = find_vllm(vllm)
    openai_client()
    # Ended from outside as from the keyboard: everything that was started ends with it.
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with temporary_state(config) as settings, tempfile.TemporaryDirectory(prefix="adaptd-demo-") as folder:
            return _run(settings, program, QUICK if quick else FULL, report, Path(folder))
    finally:
        signal.signal(signal.SIGTERM, previous)


def _run(config: Config, program: Path, phases: Sequence[Phase], report: Path, folder: Path) -> dict[str, Any]:
    report.mkdir(parents=True, exist_ok=True)
    console = Console()
    started = time.monotonic()
    with console.status("writing the prepared day-0 draft"):
        export.run(config, folder / "draft", version=None, prepare=True, dtype="auto")
    target, plugin, k = resolve(config.target.model, "target"), plugin_folder(folder / "plugin"), config.engine.k
    console.print(f"starting vLLM; log in {report / 'vllm.log'}")
    with vllm_server(
        program,
        target,
        folder / "draft",
        plugin,
        k=k,
        name=_MODEL,
        niceness=config.learn.niceness,
        log=_fresh(report / "vllm.log"),
    ) as server:
        console.print(f"vLLM is up after {time.monotonic() - started:.0f} s; asking the day-0 draft first")
        frozen = [Leg(phase.domain) for phase in phases]
        asyncio.run(_before(frozen, phases, config.seed, server))
        file, url = _settings_file(config, server, folder), ""
        command = [sys.executable, "-m", "adaptd.cli.main", "serve", "--config", str(file)]
        with process(command, _environment(), log := _fresh(report / "demo.log")) as daemon:
            with console.status("starting adaptd in front of it"):
                url = _announced(config, daemon, log)
                await_health(f"{url}/readyz", daemon, log, "adaptd")
            console.print(f"adaptd is up after {time.monotonic() - started:.0f} s: {url}; log in {log}")
            legs = [Leg(phase.domain) for phase in phases]
            status = asyncio.run(_through(legs, frozen, phases, config.seed, url, server, console))
    result = {
        "engine": "vllm",
        "phases": [
            {
                "domain": leg.domain,
                "requests": leg.answered,
                "adapting": leg.ends(_WINDOW),
                "frozen": day_0.ends(_WINDOW),
            }
            for leg, day_0 in zip(legs, frozen, strict=True)
        ],
        "swaps": status["publisher"]["published"],
        "events": status["events"],
        "longest_pause_s": status["publisher"]["max_pause_s"],
        "vllm_version": status["upstream"]["version"],
        "seconds": round(time.monotonic() - started, 1),
    }
    console.print(demo_table(result))
    return result


def questions(phase: Phase, seed: int, enough: Callable[[], bool]) -> Iterator[str]:
    """The shipped questions of a domain in a random order, again from the first where there are too few.

    The last window's are asked once only, when the others are through: nothing was ever learned from them.
    """
    known = pocket_prompts(phase.domain)
    random.Random(seed).shuffle(known)
    last, others = known[:_WINDOW], known[_WINDOW:]
    for n in range(phase.most - _WINDOW):
        if n >= phase.least - _WINDOW and enough():
            break
        yield others[n % len(others)]
    yield from last[: phase.most]


async def _before(frozen: Sequence[Leg], phases: Sequence[Phase], seed: int, server: str) -> None:
    """Day 0: of each phase the questions of its first and of its last window, asked of the server directly."""
    for leg, phase in zip(frozen, phases, strict=True):
        asked = list(questions(replace(phase, most=min(phase.most, 2 * _WINDOW)), seed, lambda: False))
        await send(leg, asked, url=server, server=server, model=_MODEL)


async def _through(
    legs: Sequence[Leg],
    frozen: Sequence[Leg],
    phases: Sequence[Phase],
    seed: int,
    url: str,
    server: str,
    console: Console,
) -> dict[str, Any]:
    """All phases through the proxy; the daemon's last status."""
    status = _status(url)
    with Live(Text("waiting for the first answers"), console=console, auto_refresh=False, transient=True) as live:

        def draw() -> None:
            nonlocal status
            status = _status(url)
            if console.is_terminal:
                live.update(_display(status, legs, frozen), refresh=True)

        for leg, day_0, phase in zip(legs, frozen, phases, strict=True):
            goal = status["publisher"]["published"] + phase.versions
            asked = questions(phase, seed, partial(lambda goal: status["publisher"]["published"] >= goal, goal))
            work = asyncio.create_task(send(leg, asked, url=url, server=server, model=_MODEL))
            await while_waiting(work, draw, _REFRESH_S)
            ends, before = leg.ends(_WINDOW), day_0.ends(_WINDOW)
            console.print(
                f"{leg.domain}: {leg.answered} requests, MAL by vLLM's counters first {_WINDOW} "
                f"{number(ends[f'first_{_WINDOW}_mal'])}, last {_WINDOW} {number(ends[f'last_{_WINDOW}_mal'])} "
                f"(day 0: {number(before[f'last_{_WINDOW}_mal'])}), draft version {_status(url)['publisher']['version'] or 0}"
            )
    return _status(url)


def _display(status: dict[str, Any], legs: Sequence[Leg], frozen: Sequence[Leg]) -> RenderableType:
    lines = []
    for leg, day_0 in zip(legs, frozen, strict=True):
        marks = [at for at, _ in leg.looks]
        line = [mal for a, b in zip(marks, marks[2:], strict=False) if (mal := leg.mal(a, b)) is not None]
        shown = f"{spark(line[-60:], 1.0, 3.5)} {number(line[-1])}" if line else ""
        day = number(day_0.mal(0, day_0.answered))
        lines.append(f"{leg.domain:>8} {leg.answered:4} answered, MAL by vLLM's counters {shown} (day 0: {day})")
    for event in status["events"][-5:]:
        when = time.strftime("%H:%M:%S", time.localtime(event["at"]))
        lines.append(
            f"{when} {event['kind']} {event.get('version', event.get('domain', ''))} {event.get('probe') or ''}"
        )
    return Group(render(status), Text("\n".join(lines)))


def _status(url: str) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{url}/adaptd/status", timeout=30.0, trust_env=False).json()
    return found


def _settings_file(config: Config, server: str, folder: Path) -> Path:
    """What `adaptd serve` is started with."""
    values = config.model_dump(
        mode="json", exclude_unset=True, exclude={"upstream": {"api_key"}, "server": {"admin_token"}}
    )
    values["state_dir"] = str(config.state_dir)
    values.setdefault("upstream", {})["url"] = server
    file = folder / "demo.yaml"
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    file.chmod(0o600)
    return file


def _environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith("ADAPTD_")}


def _announced(config: Config, daemon: Any, log: Path) -> str:
    deadline = time.monotonic() + _WAIT_S
    while daemon.poll() is None and time.monotonic() < deadline:
        try:
            return str(find_daemon(config.home)["url"])
        except DaemonUnavailable:
            time.sleep(0.25)
    raise UpstreamUnavailable(f"adaptd did not start: see {log}")


def _fresh(path: Path) -> Path:
    path.unlink(missing_ok=True)
    return path
