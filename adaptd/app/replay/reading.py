"""Logs into the spool, from where an earlier run stopped."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.console import Console
from rich.progress import Progress

from adaptd.app.replay.options import ReplayOptions
from adaptd.ingest.files import size
from adaptd.ingest.read import read_log
from adaptd.ingest.spool import Spool

#: Rows between two commits.
_COMMIT_ROWS = 2000


def read_logs(files: Sequence[str], options: ReplayOptions, spool: Spool, console: Console, progress: Progress) -> None:
    """Read what has not been read; afterwards records are sampled and in order of time.

    Raises:
      LogRefused: a log cannot be replayed.
    """
    if spool.note("read"):
        return
    first, row = spool.note("position", [0, 0])
    task = progress.add_task("reading", total=sum(map(size, files)) or None, unit="B")
    done = sum(size(f) for f in files[:first])
    for index in range(first, len(files)):
        if options.limit is not None and spool.kept >= options.limit:
            break
        before = done
        _read_file(
            files[index],
            index,
            row if index == first else 0,
            options,
            spool,
            lambda n, before=before: progress.update(task, completed=before + n),  # type: ignore[misc]
        )
        done += size(files[index])
    spool.settle()
    if options.sample is not None and options.sample >= 1:
        spool.keep_lowest(int(options.sample), "left out by --sample")
    spool.order()
    spool.commit(read=True, at="its first record")
    progress.remove_task(task)
    formats = ", ".join(f"{n:,} of {name}" for name, n in spool.counts("format").items())
    console.print(f"read {spool.count():,} records; {formats or 'none'}; not used: {reasons(spool)}")


def _read_file(
    name: str, index: int, skip: int, options: ReplayOptions, spool: Spool, told: Callable[[int], None]
) -> None:
    spool.start_file()
    last = skip
    seen = 0
    for found in read_log(name, options.reading, skip=skip, progress=told):
        if found.place.number != last:
            # A row may hold several records: only whole rows are committed, and counted against the limit.
            seen += 1
            if seen % _COMMIT_ROWS == 0:
                spool.commit(position=[index, last], at=f"{name}, line {last}")
            if options.limit is not None and spool.kept >= options.limit:
                break
            last = found.place.number
        spool.add(found)
    spool.commit(position=[index + 1, 0], at=f"the end of {name}")


def reasons(spool: Spool) -> str:
    """What is not used, and how often."""
    rows = spool.refusals()
    return "; ".join(f"{row['count']:,} {reason}" for reason, row in rows.items()) or "nothing"
