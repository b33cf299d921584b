"""Everything beside generation but the dashboard: models, health, metrics, status and checkpoints."""

from __future__ import annotations

import hmac
import ipaddress
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field

from adaptd.errors import RequestRefused, UnknownModel
from adaptd.report.split import Baseline
from adaptd.server.feed import StatusFeed
from adaptd.server.service import Operations, Service
from adaptd.server.streams import EventStream

#: Seconds after which a probe or a client may ask a daemon again that is loading or draining.
_RETRY_S = 1
#: `created` of a model in /v1/models; a constant, because OpenAI requires the field and nothing reads it.
_CREATED = 1_700_000_000


class AdminUnauthorized(RequestRefused):
    """An administrative request without a bearer token."""

    status = 401
    type = "authentication_error"
    code = "unauthorized"


class AdminForbidden(RequestRefused):
    """An administrative request with another token, from another machine, or to a daemon that takes none."""

    status = 403
    type = "permission_error"
    code = "forbidden"


class PromoteRequest(BaseModel):
    """Body of POST /adaptd/checkpoints/promote."""

    version: int = Field(ge=1)
    force: bool = False
    """Lift the quarantine of a version that live traffic refused."""


def router(service: Operations, *, admin_token: str | None, admin_remote: bool) -> APIRouter:
    """The routes in front of `service`; see `adaptd.server.app.create_app` for the arguments."""
    routes = APIRouter()
    _health(routes, service)
    _status(routes, service)
    _report(routes, service, admin_token, admin_remote)
    _checkpoints(routes, service, admin_token, admin_remote)
    return routes


def models(service: Service) -> APIRouter:
    """The routes that list models."""
    routes = APIRouter()

    def card(name: str) -> dict[str, Any]:
        context = service.limits().context_length
        return {"id": name, "object": "model", "created": _CREATED, "owned_by": "adaptd", "max_model_len": context}

    @routes.get("/v1/models")
    async def listed() -> Response:
        return JSONResponse({"object": "list", "data": [card(name) for name in service.models()]})

    @routes.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        if name not in service.models():
            raise UnknownModel(
                f"the model {name[:100]!r} does not exist; this daemon serves {', '.join(service.models())}"
            )
        return JSONResponse(card(name))

    return routes


def _health(routes: APIRouter, service: Operations) -> None:
    @routes.get("/livez")
    async def livez() -> Response:
        return JSONResponse({"status": "live"})

    @routes.get("/readyz")
    @routes.get("/healthz")
    async def readyz() -> Response:
        ready, state = service.ready()
        if ready:
            return JSONResponse({"status": "ready", "state": state})
        return JSONResponse({"status": "not ready", "state": state}, 503, {"retry-after": str(_RETRY_S)})

    @routes.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _status(routes: APIRouter, service: Operations) -> None:
    feed = StatusFeed(service)

    @routes.get("/adaptd/status")
    async def status(since: Annotated[str | None, Query(max_length=32)] = None) -> Response:
        return JSONResponse(dict(await service.status(since)), headers={"cache-control": "no-store"})

    @routes.get("/adaptd/stream")
    async def stream() -> Response:
        feed.admit()
        told = feed.events()
        return EventStream(told, told)


def _report(routes: APIRouter, service: Operations, token: str | None, remote: bool) -> None:
    @routes.get("/adaptd/report")
    async def report(
        request: Request,
        since: Annotated[str, Query(max_length=32)] = "7d",
        baseline: Baseline = "first",
        traces: Annotated[int, Query(ge=1, le=4000)] = 400,
    ) -> Response:
        # It names single tokens of answers: from another machine that takes the administrator's token.
        if not _is_local(request):
            _authorise(request, token, remote)
        found = await service.report(since, baseline, traces)
        return JSONResponse(dict(found), headers={"cache-control": "no-store"})


def _checkpoints(routes: APIRouter, service: Operations, token: str | None, remote: bool) -> None:
    async def administrator(request: Request) -> None:
        _authorise(request, token, remote)

    guarded = [Depends(administrator)]

    @routes.get("/adaptd/checkpoints", dependencies=guarded)
    async def checkpoints() -> Response:
        return JSONResponse({"versions": [dict(version) for version in await service.checkpoints_list()]})

    @routes.post("/adaptd/checkpoints/promote", dependencies=guarded)
    async def promote(body: PromoteRequest) -> Response:
        return JSONResponse(dict(await service.promote(body.version, body.force)))

    @routes.post("/adaptd/checkpoints/rollback", dependencies=guarded)
    async def rollback() -> Response:
        return JSONResponse(dict(await service.rollback()))


def _authorise(request: Request, token: str | None, remote: bool) -> None:
    """Raise unless the request comes from this machine (or may come from elsewhere) with the right bearer token."""
    if token is None:
        raise AdminForbidden("administration is off because no token is set; set server.admin_token and restart")
    if not remote and not _is_local(request):
        raise AdminForbidden("administration is only open to this machine; use it from there")
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not given:
        raise AdminUnauthorized("no bearer token was sent; send `authorization: Bearer TOKEN` with server.admin_token")
    if not hmac.compare_digest(given.strip().encode(), token.encode()):
        raise AdminForbidden("the bearer token is not server.admin_token")


def _is_local(request: Request) -> bool:
    """Whether the peer is this machine; a Unix socket has no address and is."""
    if request.client is None or not request.client.host:
        return True
    try:
        address = ipaddress.ip_address(request.client.host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback
