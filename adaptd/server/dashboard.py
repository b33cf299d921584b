"""The dashboard: one page with its scripts and styles, all of them from here.

The policy names the scripts by their hashes and lets the page talk to this server alone. Behind a proxy the origin is
shared with whatever the upstream answers, so that `'self'` would not do for scripts.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping
from importlib import resources

from fastapi import APIRouter, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException

#: Where the page looks for its parts.
_PREFIX = "/adaptd/static/"
_TYPES = {".js": "text/javascript; charset=utf-8", ".css": "text/css; charset=utf-8"}


def router() -> APIRouter:
    """The routes of the page and its parts."""
    routes = APIRouter(include_in_schema=False)
    page, policy, parts = load()
    headers = {"cache-control": "no-cache", "x-content-type-options": "nosniff"}

    @routes.get("/")
    async def dashboard() -> Response:
        guarded = {**headers, "content-security-policy": policy, "referrer-policy": "no-referrer"}
        return Response(page, media_type="text/html; charset=utf-8", headers=guarded)

    @routes.get(_PREFIX + "{name}")
    async def part(name: str, request: Request) -> Response:
        if name not in parts:
            raise HTTPException(404)
        body, media_type = parts[name]
        tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers={**headers, "etag": tag})
        return Response(body, media_type=media_type, headers={**headers, "etag": tag})

    return routes


def load() -> tuple[bytes, str, Mapping[str, tuple[bytes, str]]]:
    """The page with the hash of each part beside its address, its policy, and the parts with their types."""
    folder = resources.files("adaptd.server").joinpath("static")
    page = folder.joinpath("index.html").read_text(encoding="utf-8")
    parts: dict[str, tuple[bytes, str]] = {}
    digests: dict[str, str] = {}
    for name in re.findall(rf'"{_PREFIX}([\w.-]+)"', page):
        body = folder.joinpath(name).read_bytes()
        parts[name] = (body, _TYPES[name[name.rindex(".") :]])
        digests[name] = f"sha256-{base64.b64encode(hashlib.sha256(body).digest()).decode()}"
        address = f'"{_PREFIX}{name}"'
        page = page.replace(address, f'{address} integrity="{digests[name]}"')
    scripts = " ".join(f"'{digest}'" for name, digest in digests.items() if name.endswith(".js"))
    policy = (
        f"default-src 'none'; script-src {scripts}; style-src 'self'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page.encode(), policy, parts
