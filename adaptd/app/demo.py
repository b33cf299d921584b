"""`adaptd demo`: the closed loop on the pocket pair. Traffic changes, acceptance falls, the draft wins it back.

The adapting draft's figures are counts of real decoding. The frozen draft's come from the same answers: one
teacher-forced pass gives the expected rounds that the day-0 draft would have needed (`adaptd.learning.evaluate`), so the
two are compared request by request on identical text.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from adaptd import log
from adaptd.actors.parts import load_draft
from adaptd.app.daemon import Daemon
from adaptd.config import Config, load
from adaptd.decoding.request import DecodeRequest, SamplingParams
from adaptd.learning.evaluate import profiles
from adaptd.models.chat import render_chat
from adaptd.models.load import load_tokenizer, resolve
from adaptd.pocket.shipped import pocket_prompts
from adaptd.report.charts import demo_report
from adaptd.report.status import render
from adaptd.report.tables import demo_table, number
from buffers.table import ReplayTable
from buffers.trace import Trace

_TEMPERATURE = 0.8
_MAX_TOKENS = 64
_CONCURRENCY = 8
_WINDOW = 100
_REFRESH_S = 0.5
#: The demonstration's settings over the defaults: short requests, a gate that sees enough of them, short ticks, and of
#: the draft only the gated expert.
_SETTINGS: dict[str, Any] = {
    "deployment": "demo",
    "engine": {"max_length": 320},
    "adapt": {"width": 256, "lora_rank": 0, "head_rank": 0, "embed_rank": 0},
    "capture": {"reserved_share": 0.2},
    "learn": {
        "interval_s": 10.0,
        "min_new_traces": 16,
        "epsilon": 1.33,
        "steps_per_tick": 12,
    },
    "recall": {"seeded": True},
    "gate": {"max_traces": 48, "max_regression": 0.015},
    "server": {"port": 0},
}


@dataclass(frozen=True, slots=True)
class Phase:
    """Traffic of one domain: at most `requests`, and no new one after `seconds`."""

    domain: str
    requests: int
    seconds: float


FULL = (Phase("medical", 120, 25), Phase("math", 400, 82), Phase("tools", 250, 32), Phase("medical", 320, 50))
QUICK = (Phase("medical", 60, 12), Phase("math", 140, 25), Phase("tools", 60, 12), Phase("medical", 60, 12))


@dataclass(slots=True)
class Served:
    """One answered request of the demonstration."""

    phase: int
    request_id: str
    emitted: int
    rounds: int
    draft_version: int
    at: float
    frozen_rounds: float | None = None


@dataclass(slots=True)
class Traffic:
    """The client side: keeps a fixed number of requests in flight."""

    daemon: Daemon
    tokenizer: Any
    served: list[Served] = field(default_factory=list)
    sent: int = 0

    async def run(self, index: int, phase: Phase, seed: int) -> None:
        """Send one phase and wait for its answers."""
        prompts = pocket_prompts(phase.domain)
        random.Random(seed + index).shuffle(prompts)
        deadline = time.monotonic() + phase.seconds
        numbers = iter(range(phase.requests))

        async def client() -> None:
            for number_ in numbers:
                if time.monotonic() > deadline:
                    return
                await self._one(index, phase, prompts[number_ % len(prompts)], seed)

        await asyncio.gather(*(client() for _ in range(_CONCURRENCY)))

    async def _one(self, index: int, phase: Phase, prompt: str, seed: int) -> None:
        self.sent += 1
        request = DecodeRequest(
            request_id=f"demo-{self.sent}",
            prompt_ids=tuple(render_chat(self.tokenizer, [{"role": "user", "content": prompt}])),
            params=SamplingParams(temperature=_TEMPERATURE, max_tokens=_MAX_TOKENS, seed=seed + self.sent),
            domain=phase.domain,
        )
        async for delta in self.daemon.generate(request, stream=False):
            if delta.finished is not None:
                s = delta.finished.stats
                self.served.append(
                    Served(index, request.request_id, s.emitted, s.rounds, s.draft_version_max, time.time())
                )


def settings_for(path: Path | None, sets: list[str] | None) -> Config:
    """The demonstration's settings, overridden by file and `--set`; state goes to a temporary folder unless set."""
    given = load(path, sets or ())
    merged = given.model_dump(exclude_unset=True)
    for section, values in _SETTINGS.items():
        merged[section] = (
            {**values, **merged.get(section, {})} if isinstance(values, dict) else merged.get(section, values)
        )
    return Config(**merged)


def run(config: Config, *, quick: bool, report: Path) -> dict[str, Any]:
    """Run the demonstration and print its table; the result in the form of design section 4 (`demo`)."""
    with temporary_state(config) as settings:
        return asyncio.run(_run(settings, QUICK if quick else FULL, report))


@contextlib.contextmanager
def temporary_state(config: Config) -> Iterator[Config]:
    """Each demonstration starts at day 0: a folder of its own, unless the user names one."""
    if "state_dir" in config.model_fields_set:
        yield config
        return
    folder = Path(tempfile.mkdtemp(prefix="adaptd-demo-"))
    try:
        yield config.model_copy(update={"state_dir": folder})
    finally:
        shutil.rmtree(folder, ignore_errors=True)


async def _run(config: Config, phases: tuple[Phase, ...], report: Path) -> dict[str, Any]:
    report.mkdir(parents=True, exist_ok=True)
    console = Console()
    started = time.monotonic()
    with (report / "demo.log").open("w") as stream:
        log.configure(config.log.level, "json", stream)
        daemon = Daemon(config, log_to_driver=False)
        traffic = Traffic(daemon, load_tokenizer(resolve(config.target.model, "target")))
        try:
            with console.status("starting Redis, Ray, one decoder and the learner"):
                await daemon.start()
            console.print(f"ready in {time.monotonic() - started:.0f} s; log in {report / 'demo.log'}")
            await _drive(daemon, traffic, phases, config.seed, console)
            await daemon.flush()
            traces = await asyncio.to_thread(_traces, daemon.table)
        finally:
            await daemon.stop()
    with console.status("scoring the frozen draft on the same answers"):
        await asyncio.to_thread(_score_frozen, config, traffic.served, traces)
    result = _result(phases, traffic.served, daemon)
    result["seconds"] = round(time.monotonic() - started, 1)
    console.print(demo_table(result))
    for path in demo_report(result, traffic.served, phases, report):
        console.print(f"wrote {path}")
    return result


async def _drive(daemon: Daemon, traffic: Traffic, phases: tuple[Phase, ...], seed: int, console: Console) -> None:
    with Live(Text("waiting for the first answers"), console=console, auto_refresh=False, transient=True) as live:
        for index, phase in enumerate(phases):
            task = asyncio.create_task(traffic.run(index, phase, seed))
            while not task.done():
                await asyncio.wait({task}, timeout=_REFRESH_S)
                if console.is_terminal:
                    live.update(_display(await daemon.status(), phase, traffic), refresh=True)
            await task
            done = [s for s in traffic.served if s.phase == index]
            console.print(
                f"phase {index + 1} {phase.domain}: {len(done)} requests, MAL first {_WINDOW} "
                f"{number(_mal(done[:_WINDOW]))}, last {_WINDOW} {number(_mal(done[-_WINDOW:]))}, "
                f"draft version {done[-1].draft_version}"
            )


def _display(status: dict[str, Any], phase: Phase, traffic: Traffic) -> RenderableType:
    lines = [f"traffic now: {phase.domain}, {len(traffic.served)} answered"]
    for event in status["events"][-6:]:
        when = time.strftime("%H:%M:%S", time.localtime(event["at"]))
        about = {k: v for k, v in event.items() if k not in ("at", "kind", "gain")}
        lines.append(f"{when} {event['kind']} {about}")
    return Group(render(status), Text("\n".join(lines)))


def _mal(served: list[Served]) -> float | None:
    rounds = sum(s.rounds for s in served)
    return sum(s.emitted for s in served) / rounds if rounds else None


def _frozen_mal(served: list[Served]) -> float | None:
    known = [s for s in served if s.frozen_rounds]
    rounds = sum(s.frozen_rounds or 0.0 for s in known)
    return sum(s.emitted for s in known) / rounds if rounds else None


def _traces(table: ReplayTable) -> dict[str, Trace]:
    found = [*table.all("recent", 10**6), *table.all("reserved", 10**6)]
    return {s.trace.request_id: s.trace for s in found}


def _score_frozen(config: Config, served: list[Served], traces: dict[str, Trace]) -> None:
    known = [s for s in served if s.request_id in traces]
    draft, _ = load_draft(config, "cpu", "float32", serving=True)
    scored = profiles(
        draft.model, [traces[s.request_id] for s in known], config.engine.k, max_tokens=config.engine.max_length
    )
    for item, profile in zip(known, scored, strict=True):
        item.frozen_rounds = profile.rounds


def _result(phases: tuple[Phase, ...], served: list[Served], daemon: Daemon) -> dict[str, Any]:
    rows = []
    for index, phase in enumerate(phases):
        done = [s for s in served if s.phase == index]
        rows.append(
            {
                "domain": phase.domain,
                "requests": len(done),
                "adapting": {"first_100_mal": _mal(done[:_WINDOW]), "last_100_mal": _mal(done[-_WINDOW:])},
                "frozen": {"first_100_mal": _frozen_mal(done[:_WINDOW]), "last_100_mal": _frozen_mal(done[-_WINDOW:])},
            }
        )
    swaps = sum(1 for e in daemon.events if e["kind"] in ("promoted", "rollback"))
    return {"phases": rows, "swaps": swaps, "events": daemon.events}
