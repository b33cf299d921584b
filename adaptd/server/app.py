"""The HTTP application: routes, error bodies and middleware around a `Service`. It owns nothing and starts nothing."""

from __future__ import annotations

from fastapi import FastAPI

from adaptd import __version__
from adaptd.server import completions, dashboard, errors, operations
from adaptd.server.middleware import RequestContext
from adaptd.server.service import Operations, Service

#: Longest request body: a context of a million tokens as text is about 4 MiB.
MAX_BODY_BYTES = 16 * 2**20
#: Seconds for connections that are still open once a daemon has drained. Every answer was given by then: what is left is
#: who looks at the dashboard from a machine that sleeps.
LINGER_S = 5


def create_app(
    service: Service,
    *,
    admin_token: str | None = None,
    admin_remote: bool = False,
    max_body_bytes: int = MAX_BODY_BYTES,
) -> FastAPI:
    """The application in front of `service`.

    Args:
        service: the daemon behind the routes.
        admin_token: bearer token of the routes under /adaptd/checkpoints; None (or empty) refuses them all.
        admin_remote: whether those routes answer other machines as well.
        max_body_bytes: a longer request body is refused with 413.
    """
    app = _bare(max_body_bytes)
    app.include_router(completions.router(service))
    app.include_router(operations.models(service))
    app.include_router(operations.router(service, admin_token=admin_token or None, admin_remote=admin_remote))
    return app


def create_operations_app(
    service: Operations, *, admin_token: str | None = None, admin_remote: bool = False
) -> FastAPI:
    """The application of a daemon that does not decode itself: everything of `create_app` but generation and models."""
    app = _bare(MAX_BODY_BYTES)
    app.include_router(operations.router(service, admin_token=admin_token or None, admin_remote=admin_remote))
    return app


def _bare(max_body_bytes: int) -> FastAPI:
    # The interactive documentation pages load scripts from elsewhere, so only the machine-readable schema is served.
    app = FastAPI(title="adaptd", version=__version__, docs_url=None, redoc_url=None, openapi_url="/openapi.json")
    app.add_middleware(RequestContext, max_body_bytes=max_body_bytes)
    errors.install(app)
    app.include_router(dashboard.router())
    return app
