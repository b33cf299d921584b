"""`adaptd status`: ask the running daemon and draw what it says."""

from __future__ import annotations

import time
from typing import Any

import httpx
from rich.live import Live

from adaptd.app.state import find_daemon
from adaptd.cli.common import print_json
from adaptd.config import Config
from adaptd.errors import DaemonUnavailable
from adaptd.report.status import render
from adaptd.report.tables import show as show_table

_REFRESH_S = 2.0


def fetch(config: Config) -> dict[str, Any]:
    """The status of the daemon that runs on this configuration's folder.

    Raises:
      DaemonUnavailable: none runs, or it does not answer.
    """
    url = find_daemon(config.home)["url"]
    try:
        answer = httpx.get(f"{url}/adaptd/status", timeout=10)
        answer.raise_for_status()
    except httpx.HTTPError as error:
        raise DaemonUnavailable(
            f"the daemon at {url} does not answer ({type(error).__name__}): is it starting or stopping?"
        ) from error
    found: dict[str, Any] = answer.json()
    return found


def show(config: Config, *, as_json: bool, watch: bool) -> None:
    """Print the status once, or redraw it until interrupted."""
    if as_json:
        print_json(fetch(config))
        return
    if not watch:
        show_table(render(fetch(config)))
        return
    with Live(render(fetch(config)), auto_refresh=False, screen=True) as live:
        while True:
            time.sleep(_REFRESH_S)
            live.update(render(fetch(config)), refresh=True)
