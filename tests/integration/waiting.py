"""Waiting for what another process does."""

from __future__ import annotations

import time
from typing import Any, Protocol


class Wait(Protocol):
    """Gives what `condition` gives once it is true; an AssertionError that names `what` after so many seconds."""

    def __call__(self, what: str, condition: Any, seconds: float = ...) -> Any: ...


def waiter(patience: float) -> Wait:
    """One that waits so many seconds where it is not told otherwise."""

    def wait_for(what: str, condition: Any, seconds: float = patience) -> Any:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if found := condition():
                return found
            time.sleep(0.25)
        raise AssertionError(f"timed out waiting for {what}")

    return wait_for
