"""`adaptd status`: ask the running daemon and draw what it says."""

from __future__ import annotations

import time
from typing import Any

import httpx
from rich.live import Live

from adaptd.app.state import find_daemon
from adaptd.cli.common import print_json, since_moment
from adaptd.config import Config
from adaptd.errors import BufferAway, DaemonUnavailable, RequestRefused
from adaptd.report.status import render
from adaptd.report.tables import show as show_table

_REFRESH_S = 2.0
#: Answers that say themselves what to do.
_REFUSED: dict[int, type[RequestRefused]] = {
    400: RequestRefused,
    401: RequestRefused,
    403: RequestRefused,
    503: BufferAway,
}


def fetch(
    config: Config, path: str = "/adaptd/status", timeout_s: float = 10.0, **params: str | None
) -> dict[str, Any]:
    """What the daemon that runs on this configuration's folder answers to a GET; parameters that are None are left out.

    Raises:
      DaemonUnavailable: none runs, or it does not answer. RequestRefused: it says why it does not do that.
    """
    url = find_daemon(config.home)["url"]
    try:
        given = {name: value for name, value in params.items() if value is not None}
        answer = httpx.get(f"{url}{path}", params=given, timeout=timeout_s)
        if answer.status_code in _REFUSED:
            raise _REFUSED[answer.status_code](answer.json()["error"]["message"])
        answer.raise_for_status()
    except httpx.HTTPError as error:
        raise DaemonUnavailable(
            f"the daemon at {url} does not answer ({type(error).__name__}): is it starting or stopping?"
        ) from error
    found: dict[str, Any] = answer.json()
    return found


def show(config: Config, *, as_json: bool, watch: bool, since: str | None = None) -> None:
    """Print the status once, with the trends since then if given, or redraw it until interrupted."""
    since_moment(since)
    if as_json:
        print_json(fetch(config, since=since))
        return
    if not watch:
        show_table(render(fetch(config, since=since)))
        return
    with Live(render(fetch(config, since=since)), auto_refresh=False, screen=True) as live:
        while True:
            time.sleep(_REFRESH_S)
            live.update(render(fetch(config, since=since)), refresh=True)
