"""`adaptd replay`, composed: read, choose, judge, evaluate, learn, report. Works with the daemon stopped."""

from __future__ import annotations

import dataclasses
import re
import resource
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from adaptd import log
from adaptd.actors.threads import set_threads
from adaptd.app.replay import summary
from adaptd.app.replay.choose import spend_budget
from adaptd.app.replay.learning import Rehearsal
from adaptd.app.replay.lessons import Lesson, Lessons
from adaptd.app.replay.models import ReplayModels, load_models
from adaptd.app.replay.options import ReplayOptions
from adaptd.app.replay.reading import read_logs, reasons
from adaptd.app.replay.work import Work
from adaptd.config import Config
from adaptd.decoding.costs import measure_costs
from adaptd.errors import AdaptdError, ConfigError, LogRefused
from adaptd.ingest.files import expand
from adaptd.ingest.read import unusable
from adaptd.ingest.spool import Queued, Spool
from adaptd.report.replay import progress_columns, replay_report, replay_table
from buffers.codec import decode, encode
from buffers.errors import TableUnavailable
from policies.acceptance import Profile

#: Held-out records below which MAL is that of the records before they were learned from.
_LEAST_HELD = 8
#: Depths whose costs are measured, beside the configured k.
_DEPTHS = (1, 2, 3, 4, 6, 8)
_REMEDIES = (
    ": --served-as NAME or --assume-target says which answers are the target's; --teacher auto or --regenerate has it answer "
    "the others again"
)


def run(config: Config, paths: Sequence[str], options: ReplayOptions, report: Path) -> dict[str, Any]:
    """Replay and report; the result in the form of design section 4 (`replay`).

    Raises:
      LogRefused: a log cannot be replayed, or there is nothing in it to learn from.
      AdaptdError: a daemon runs on this deployment, its folder cannot be written, or the buffer cannot be reached.
    """
    files, config = expand(paths), nothing_gone(config)
    report.mkdir(parents=True, exist_ok=True)
    # An age is another time in every run.
    about = dataclasses.asdict(options) | {"fresh": None, "since": options.since_said}
    work = Work(config, files, about, dry=options.dry_run)
    console = Console()
    started = time.monotonic()
    with work.locked():
        resumed = work.prepare(fresh=options.fresh or "-" in files)
        found = _stages(config, files, options, work, console, report, resumed)
        found |= {"peak_rss_bytes": peak_rss(), "seconds": round(time.monotonic() - started, 1)}
        console.print(*replay_table(found), sep="\n")
        for path in replay_report(found, report):
            console.print(f"wrote {path}")
        work.remove()
    return found


def nothing_gone(config: Config) -> Config:
    """What a log once asked may be asked again, and its files may hold a domain each: `gate.gone_loss` is 0 unless it is set."""
    if "gone_loss" in config.gate.model_fields_set:
        return config
    return config.model_copy(update={"gate": config.gate.model_copy(update={"gone_loss": 0.0})})


def _stages(
    config: Config,
    files: Sequence[str],
    options: ReplayOptions,
    work: Work,
    console: Console,
    report: Path,
    resumed: bool,
) -> dict[str, Any]:
    """All stages; what is left of them when they end early is gone on with, unless they would end the same way again."""
    need_answer = options.teaching.wanted in ("target", "black-box")
    spool = Spool(
        work.spool,
        with_answer=options.teaching.wanted != "regenerate",
        share=options.sample if options.sample is not None and options.sample < 1 else 1.0,
        unusable=lambda record: unusable(record, since=options.since, need_answer=need_answer),
    )
    try:
        with log.to_file(report / "replay.log", config.log.level):
            replay = _Replay(config, options, work, spool, console)
            if resumed:
                console.print(f"going on with an interrupted replay at {spool.note('at', 'its first record')}")
            with Progress(*progress_columns(), console=console, transient=True) as progress:
                read_logs(files, options, spool, console, progress)
                return replay.learn(progress)
    except KeyboardInterrupt:
        console.print(f"interrupted at {spool.note('at', 'its first record')}; the same command goes on from there")
        raise
    except TableUnavailable as error:
        raise AdaptdError(
            f"the buffer cannot be reached ({error}); the same command goes on where it stopped"
        ) from error
    except (LogRefused, ConfigError):
        work.remove()
        raise
    finally:
        spool.close()


class _Replay:
    """The stages, over one spool."""

    def __init__(self, config: Config, options: ReplayOptions, work: Work, spool: Spool, console: Console) -> None:
        self._config, self._options, self._work, self._spool = config, options, work, spool
        self._console = console

    # -- learning -----------------------------------------------------------------------------------------------------

    def learn(self, progress: Progress) -> dict[str, Any]:
        """Choose, judge, evaluate, learn; the result without what the run as a whole adds."""
        config, options, spool = self._config, self._options, self._spool
        self._require_records()
        models = load_models(config, options.teaching.wanted)
        lessons = Lessons(config, models, options.teaching, spool)
        with self._work.table() as table:
            share = self._held_share()
            if options.budget is not None and not spool.note("chosen"):
                held = partial(_held_out, share=share)
                spend_budget(config, models, lessons, spool, table, options.budget, options.select, held, progress)
                spool.commit(chosen=True)
            rehearsal = Rehearsal(config, models, table, self._work.home, self._work.start, _rng(config.seed, 1))
            self._walk(models, lessons, rehearsal, share, progress)
            if not spool.note("settled"):
                task = progress.add_task("settling", total=None, unit="ticks")
                for _ in rehearsal.settle():
                    progress.advance(task)
                progress.remove_task(task)
                spool.commit(settled=True)
            return self._result(models, rehearsal, progress)

    def _require_records(self) -> None:
        if self._spool.count():
            return
        raise LogRefused(f"nothing to replay: no record was usable ({reasons(self._spool)})")

    def _held_share(self) -> float:
        """Share of the records that is held out; what it is of all records, before a budget is spent."""
        known = self._spool.note("held share")
        if known is not None:
            return float(known)
        share = min(self._options.holdout, self._options.max_held / self._spool.count())
        self._spool.commit(**{"held share": share})
        return share

    def _walk(
        self, models: ReplayModels, lessons: Lessons, rehearsal: Rehearsal, share: float, progress: Progress
    ) -> None:
        """Every record once, in order of time; committed with its outcome a chunk at a time."""
        spool = self._spool
        total = spool.count()
        first = int(spool.note("learned", 0))
        task = progress.add_task("learning", total=total, completed=first, unit="records")
        for batch in spool.walk(first, models.chunk):
            found = lessons.prepare(batch)
            held = [_held_out(lesson.queued, share) for lesson in found]
            rows = [
                _outcome(lesson, out, before, now)
                for (lesson, out), (_, before, now) in zip(
                    zip(found, held, strict=True),
                    rehearsal.observe([lesson.trace for lesson in found], held),
                    strict=True,
                )
            ]
            spool.keep_outcomes(rows)
            done = batch[-1].rank + 1
            spool.commit(learned=done, at=f"record {done:,} of {total:,}")
            progress.update(task, completed=done)
        progress.remove_task(task)

    def _result(self, models: ReplayModels, rehearsal: Rehearsal, progress: Progress) -> dict[str, Any]:
        config, spool, options = self._config, self._spool, self._options
        task = progress.add_task("evaluating what was held out", total=None, unit="")
        overall = summary.prequential(spool, config.seed)
        traces = [decode(payload) for payload in spool.held_traces()]
        if not overall["records"] and not traces:
            raise LogRefused(f"nothing to replay: no record was usable ({reasons(spool)}){_REMEDIES}")
        found: dict[str, Any] = {
            "records": overall["records"] + len(traces),
            "refused": {reason: row["count"] for reason, row in spool.refusals().items()},
            "refused_first": {reason: row["first"] for reason, row in spool.refusals().items() if row["first"]},
            "formats": spool.counts("format"),
            "teacher": self._teacher(models),
            "dry_run": options.dry_run,
            "selection": {"budget": options.budget, "by": options.select} if options.budget is not None else None,
            "versions": {"before": rehearsal.before_version, "after": rehearsal.version},
            "prequential": overall,
            "k": config.engine.k,
        }
        found |= self._measure(models, rehearsal, traces, overall)
        progress.remove_task(task)
        return found

    def _measure(
        self, models: ReplayModels, rehearsal: Rehearsal, traces: list[Any], overall: dict[str, Any]
    ) -> dict[str, Any]:
        """The figures of what was held out; of everything before it was learned from where that is too little."""
        config, seed = self._config, self._config.seed
        nothing = {"with_recall": None, "oracle": None, "recommended_k": None, "speedup": None, "costs": None}
        if len(traces) < _LEAST_HELD:
            return nothing | {
                "measured_on": "records before they were learned from",
                "mal_before": overall["mal_before"],
                "mal_after": overall["mal_during"],
                "gain": None,
                "by_domain": {},
            }
        before = rehearsal.profiles(traces, rehearsal.before)
        after = rehearsal.profiles(traces, rehearsal.after)
        found = nothing | summary.measured(traces, before, after, seed)
        found["measured_on"] = f"{found.pop('records')} records that were held out"
        if config.engine.kind == "native" and config.recall.enabled:
            recalled = [rehearsal.recalled(traces, version) for version in (rehearsal.before, rehearsal.after)]
            sides = [summary.interval(side, seed) for side in recalled]
            found["with_recall"] = {"mal_before": sides[0], "mal_after": sides[1]}
        if self._options.oracle:
            learned, best = rehearsal.oracle(traces)
            found["oracle"] = _against_oracle(learned, before, after, best, seed)
        if models.target is not None:
            k = config.engine.k
            depths = sorted({*(_DEPTHS), k})
            set_threads(config.engine.threads)  # as a decoder has them
            costs = measure_costs(models.target, models.draft.model, depths)
            deep = rehearsal.profiles(traces, rehearsal.after, max(depths))
            found |= summary.recommendation(deep, costs, k)
        return found

    def _teacher(self, models: ReplayModels) -> dict[str, Any]:
        counts, greedy = self._spool.counts("teacher"), self._spool.counts("greedy positions")
        agreement = greedy.get("first choice", 0) / greedy["all"] if greedy.get("all") else None
        return {
            "wanted": self._options.teaching.wanted,
            "decided": counts,
            "target": "none" if models.target is None else self._config.target.model,
            "why_no_target": models.why_no_target or None,
            # Of greedily decoded answers that are said to be the target's: near 1, or somebody else wrote them.
            "greedy_agreement": agreement,
        }


def _against_oracle(
    learned: int, before: Sequence[Profile], after: Sequence[Profile], best: Sequence[Profile], seed: int
) -> dict[str, Any]:
    mal = [sum(p.emitted for p in side) / sum(p.rounds for p in side) for side in (before, after, best)]
    gained = mal[2] - mal[0]
    return {
        "traces": learned,
        "mal": summary.interval(best, seed),
        "share_of_oracle": mal[1] / mal[2],
        "share_of_gain": (mal[1] - mal[0]) / gained if gained > 0 else None,
    }


def _held_out(queued: Queued, share: float) -> bool:
    return int.from_bytes(queued.digest[8:], "big") < share * 2**64


def _outcome(lesson: Lesson, held: bool, before: Profile, now: Profile) -> tuple[Any, ...]:
    trace = lesson.trace
    payload = encode(trace) if held else None
    return (
        lesson.queued.rank,
        trace.created_at,
        trace.domain,
        int(held),
        now.emitted,
        before.rounds,
        now.rounds,
        payload,
    )


def _rng(seed: int, stream: int) -> np.random.Generator:
    return np.random.default_rng([seed, 0x2E91A, stream])


def peak_rss() -> int:
    """Most memory that this process has had, in bytes; on Linux without what its parent had before it."""
    status = Path("/proc/self/status")
    if status.is_file() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
