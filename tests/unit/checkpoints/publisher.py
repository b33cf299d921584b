"""A process that publishes until it is killed; `test_crash.py` drives it.

Importing torch takes seconds, so this process does it once and says so. Then, for every line that it reads, it forks a
publisher and prints its process id, and when that has died, how. A publisher runs the real `CheckpointStore.publish`, and
now and then `prune` and `rollback`.
"""

from __future__ import annotations

import contextlib
import os
import sys

import torch

import checkpoints.tensors  # noqa: F401  the store imports it at the first write; here that has to come before the fork
from checkpoints.errors import CheckpointNotFound
from checkpoints.store import CheckpointStore


def publish(root: str) -> None:
    """Publish for ever, tensors whose every value is the version they are meant for."""
    store = CheckpointStore(root)
    while True:
        version = (store.current() or 0) + 1
        value = float(version)
        store.publish(
            {"weight": torch.full((32, 64), value), "bias": torch.full((64,), value)},
            base_id="base",
            tokenizer_hash="tokenizer",
            scope="lora",
            scope_config={},
            gate={},
            window={},
            config={},
        )
        if version % 5 == 0:
            store.prune(4)
        if version % 7 == 0:
            with contextlib.suppress(CheckpointNotFound):  # its parent may have been pruned
                store.rollback()


def main(root: str) -> None:
    """Fork one publisher per line of standard input."""
    torch.set_num_threads(1)
    print("ready", flush=True)
    for _ in sys.stdin:
        if (child := os.fork()) == 0:
            publish(root)
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
