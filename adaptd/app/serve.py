"""`adaptd serve`: the daemon behind HTTP, until SIGTERM or SIGINT."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import time
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from adaptd import events, log
from adaptd.app.daemon import Daemon
from adaptd.app.service import DaemonService, OperationsService
from adaptd.app.sidecar import SidecarDaemon
from adaptd.config import Config
from adaptd.errors import AdaptdError
from adaptd.log import logger
from adaptd.server.app import LINGER_S, create_app, create_operations_app
from adaptd.sidecar.dispatch import Dispatch

_log = logger(__name__)


def run(config: Config) -> None:
    """Serve until a signal; the first drains, the second stops at once.

    Raises:
      AdaptdError: the port is in use, state_dir is not writable, the models do not fit.
    """
    log.configure(config.log.level, config.log.style)
    # uvloop where it is installed, which spends less on each event of a stream.
    with asyncio.Runner(loop_factory=uvicorn.Config("", log_config=None).get_loop_factory()) as runner:
        runner.run(_serve(config))


def bind(config: Config) -> socket.socket:
    """The listening socket, bound before anything slow is started.

    Raises:
      AdaptdError: the address cannot be bound.
    """
    try:
        return socket.create_server((config.server.host, config.server.port), backlog=256)
    except OSError as error:
        raise AdaptdError(
            f"cannot listen on {config.server.host}:{config.server.port} ({error.strerror}): "
            "another program has it; stop that, or set server.port (0 takes a free one)"
        ) from error


def _build(config: Config) -> tuple[Daemon | SidecarDaemon, ASGIApp]:
    """The daemon of this kind of engine, and its application."""
    token = config.server.admin_token
    admin: dict[str, Any] = {
        "admin_token": token.get_secret_value() if token else None,
        "admin_remote": config.server.admin_remote,
    }
    if config.engine.kind == "vllm":
        sidecar = SidecarDaemon(config)
        return sidecar, Dispatch(create_operations_app(OperationsService(sidecar), **admin), sidecar.proxy)
    daemon = Daemon(config)
    return daemon, create_app(DaemonService(daemon), **admin)


async def _serve(config: Config) -> None:
    started = time.monotonic()
    listener = bind(config)
    host, port = listener.getsockname()[:2]
    url = f"http://{host}:{port}"
    daemon, app = _build(config)
    # A proxied answer brings the server's own headers; ours beside them would be doubled.
    own_headers = config.engine.kind == "native"
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=LINGER_S,
            server_header=own_headers,
            date_header=own_headers,
        )
    )
    stopping = asyncio.Event()

    def on_signal() -> None:
        if stopping.is_set():
            os._exit(130)  # the second signal: everything on disk is crash-safe
        stopping.set()

    def install() -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, on_signal)

    install()
    # uvicorn would install handlers of its own; without them it stops when told.
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign, assignment]
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        # Ray's libraries put a SIGTERM handler of their own in place, which would end the process at once.
        starting = asyncio.create_task(daemon.start(url, after_cluster=install))
        await asyncio.wait({starting, asyncio.create_task(stopping.wait())}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            await starting
            _log.info(events.SERVICE_READY, url=url, seconds=round(time.monotonic() - started, 2))
            await stopping.wait()
        else:
            starting.cancel()
    finally:
        await daemon.stop()
        server.should_exit = True
        await serving
