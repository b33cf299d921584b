"""Processes of a benchmark: results with their task's number, errors, and no process that outlives the one that asked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from adaptd.bench.workers import each

_PARENT = """
import sys
from tests.unit.bench.test_workers import sleep
from adaptd.bench.workers import each

if __name__ == "__main__":
    list(each(sleep, [(sys.argv[1], 0), (sys.argv[1], 1)], 2))
"""


def square(x: int) -> int:
    """A task."""
    return x * x


def fail(x: int) -> int:
    """A task that cannot be done."""
    raise ValueError(f"{x} cannot be done")


def sleep(folder: str, number: int) -> None:
    """A task of a minute that says which process has it."""
    Path(folder, f"{number}").write_text(str(os.getpid()))
    time.sleep(60)


@pytest.mark.parametrize("jobs", [1, 2])
def test_each_result_comes_with_its_tasks_number(jobs: int) -> None:
    assert dict(each(square, [(1,), (2,), (3,)], jobs)) == {0: 1, 1: 4, 2: 9}
    with pytest.raises(ValueError, match="7 cannot be done"):
        list(each(fail, [(7,)], jobs))


def alive(pid: int) -> bool:
    """Whether it runs; one that has ended and is not yet collected does not."""
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks at /proc")
def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(_PARENT)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")])}
    parent = subprocess.Popen([sys.executable, str(script), str(tmp_path)], env=environment)
    deadline = time.monotonic() + 60

    def pids() -> list[int]:
        texts = [(tmp_path / n).read_text() for n in ("0", "1") if (tmp_path / n).exists()]
        return [int(text) for text in texts if text]

    while len(pids()) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    while any(alive(pid) for pid in pids()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
