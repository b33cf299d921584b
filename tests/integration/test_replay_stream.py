"""A long log streams: memory does not grow with it."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

from adaptd.pocket.shipped import pocket_prompts

ROOT = Path(__file__).parents[2]
READ = r"""
import re, sys
from pathlib import Path
from adaptd.ingest.read import Reading, read_log
from adaptd.ingest.spool import Spool
spool = Spool(Path(sys.argv[2]), with_answer=True)
for n, found in enumerate(read_log(sys.argv[1], Reading())):
    spool.add(found)
    if n % 2000 == 0:
        spool.commit()
spool.settle()
spool.order()
times = [q.record.at for batch in spool.walk() for q in batch]
assert times == sorted(times)
# Not getrusage: what a parent had before the fork would count.
print(len(times), re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
"""


def peak(folder: Path, lines: int) -> int:
    """KiB that reading, ordering and walking a log of so many real prompts takes at most."""
    prompts = [p for domain in ("medical", "math", "tools", "code") for p in pocket_prompts(domain)]
    log = folder / f"{lines}"
    with gzip.open(log, "wt", compresslevel=1) as file:
        for i in range(lines):
            # Neither in order of time nor two alike.
            row = {"timestamp": 1767323045 + (i * 7919) % lines, "prompt": f"{prompts[i % len(prompts)]} ({i})"}
            file.write(json.dumps(row | {"response": f"{i} " * 40}) + "\n")
    out = subprocess.run(
        [sys.executable, "-c", READ, str(log), str(folder / f"{lines}.sqlite")],
        capture_output=True, text=True, check=True, cwd=ROOT,
    )  # fmt: skip
    count, kib = map(int, out.stdout.split())
    assert count == lines
    return kib


@pytest.mark.slow
def test_two_hundred_thousand_lines_take_the_memory_of_twenty_thousand(tmp_path: Path) -> None:
    few, many = peak(tmp_path, 20_000), peak(tmp_path, 200_000)
    # The cache of the spool (32 MiB) fills; beyond it nothing grows.
    assert many < few + 48 * 1024, (few, many)
    assert many < 200 * 1024
