"""A server process around `adaptd.server.app` with the figures of a JSON file; run by tests/browser/conftest.py."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import Request

sys.path.insert(0, str(Path(__file__).parents[2]))

from adaptd.errors import RequestRefused
from adaptd.server.app import LINGER_S, create_operations_app


class Samples:
    """Implements what the routes need of a daemon; `POST /fake` sets what it says."""

    def __init__(self, figures: Mapping[str, Any]) -> None:
        self.shapes, self.trends = figures["shapes"], figures["trends"]
        self.shape, self.changes, self.draining = "native", dict[str, Any](), False

    def ready(self) -> tuple[bool, str]:
        return (False, "draining") if self.draining else (True, "ready")

    async def status(self, since: str | None) -> Mapping[str, Any]:
        if since is not None and "refuse" in self.changes:
            raise RequestRefused(self.changes["refuse"])
        known = {} if since is None or self.shape == "young" else {"trends": self.trends[since]}
        return {**self.shapes[self.shape], "draining": self.draining, **known, **self.changes}

    def metrics(self) -> bytes:
        return b""


async def main(figures: Mapping[str, Any]) -> None:
    service = Samples(figures)
    app = create_operations_app(service)  # type: ignore[arg-type]

    @app.post("/fake")
    async def told(request: Request) -> dict[str, Any]:
        changes = await request.json()
        service.shape = changes.pop("shape", service.shape)
        service.draining = changes.pop("draining", service.draining)
        service.changes = changes
        return {}

    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off", timeout_graceful_shutdown=LINGER_S))
    print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)

    # uvicorn ends on SIGTERM once every connection is closed, as the daemon does after it drained.
    def drain(*_: Any) -> None:
        service.draining = server.should_exit = True

    server.handle_exit = drain  # type: ignore[method-assign]
    await server.serve(sockets=[listener])


if __name__ == "__main__":
    asyncio.run(main(json.loads(Path(sys.argv[1]).read_text())))
