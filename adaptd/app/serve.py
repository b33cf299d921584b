"""`adaptd serve`: the daemon behind HTTP, until SIGTERM or SIGINT."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import time

import uvicorn

from adaptd import events, log
from adaptd.app.daemon import Daemon
from adaptd.app.service import DaemonService
from adaptd.config import Config
from adaptd.errors import AdaptdError
from adaptd.log import logger
from adaptd.server.app import create_app

_log = logger(__name__)


def run(config: Config) -> None:
    """Serve until a signal; the first drains, the second stops at once.

    Raises:
      AdaptdError: the port is in use, state_dir is not writable, the models do not fit.
    """
    log.configure(config.log.level, config.log.style)
    asyncio.run(_serve(config))


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


async def _serve(config: Config) -> None:
    started = time.monotonic()
    listener = bind(config)
    host, port = listener.getsockname()[:2]
    url = f"http://{host}:{port}"
    daemon = Daemon(config)
    service = DaemonService(daemon)
    token = config.server.admin_token
    app = create_app(
        service, admin_token=token.get_secret_value() if token else None, admin_remote=config.server.admin_remote
    )
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, lifespan="off"))
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
