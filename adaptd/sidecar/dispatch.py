"""Which requests are for adaptd itself: its few operational routes; every other path belongs to the server."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

_OWN = frozenset({"/", "/livez", "/readyz", "/healthz", "/metrics"})
_OWN_PREFIX = "/adaptd/"


class Dispatch:
    """ASGI application: `own` for adaptd's routes, `proxy` for the rest."""

    def __init__(self, own: ASGIApp, proxy: ASGIApp) -> None:
        self._own, self._proxy = own, proxy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        path = scope.get("path", "")
        mine = scope["type"] == "http" and (path in _OWN or path.startswith(_OWN_PREFIX))
        await (self._own if mine else self._proxy)(scope, receive, send)
