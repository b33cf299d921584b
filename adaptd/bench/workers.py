"""Processes of one thread each, for a benchmark whose parts are independent."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from typing import Any, TypeVar

from adaptd import log
from adaptd.actors.threads import set_threads

T = TypeVar("T")


def each(work: Callable[..., T], tasks: Sequence[tuple[Any, ...]], jobs: int) -> Iterator[tuple[int, T]]:
    """`work(*task)` of every task with its index, as they end; in this process if `jobs` is 1."""
    if jobs == 1 or not tasks:
        set_threads(1)
        yield from ((index, work(*task)) for index, task in enumerate(tasks))
        return
    # Spawned: a forked process inherits the locks of torch's threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(jobs, len(tasks)), mp_context=context, initializer=_prepare) as workers:
        futures: dict[Future[T], int] = {workers.submit(work, *task): index for index, task in enumerate(tasks)}
        try:
            yield from ((futures[future], future.result()) for future in as_completed(futures))
        except BaseException:
            workers.shutdown(wait=False, cancel_futures=True)
            raise


def _prepare() -> None:
    set_threads(1)
    log.configure("error", "json")
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent cannot tell its workers; each would go on to the end of its task, an hour for some."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
