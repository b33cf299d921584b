"""Failures as OpenAI error bodies: `{"error": {"message", "type", "param", "code"}}`, whatever went wrong and wherever.

No message repeats text of a prompt or a message: only numbers, names and rules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from adaptd import events
from adaptd.errors import AdaptdError, RequestRefused
from adaptd.log import logger
from checkpoints.errors import CheckpointError, CheckpointNotFound, StoreUnavailable

_log = logger(__name__)

#: Parameters that hold a client's text, whose values must not be repeated.
_PRIVATE = frozenset({"prompt", "messages", "tools", "stop", "suffix"})


class InvalidRequest(RequestRefused):
    """A parameter has a value that cannot be served (400)."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        """`param` names the parameter in the OpenAI error body."""
        super().__init__(message)
        self.param = param
        self.code = code


def error_body(
    message: str, type_: str, param: str | None = None, code: str | int | None = None
) -> dict[str, dict[str, Any]]:
    """OpenAI's error object."""
    return {"error": {"message": message, "type": type_, "param": param, "code": code}}


def refusal_body(exc: RequestRefused) -> dict[str, dict[str, Any]]:
    """OpenAI's error object for a refusal."""
    return error_body(str(exc), exc.type, getattr(exc, "param", None), exc.code)


def request_id(request: Request) -> str:
    """The id that `adaptd.server.middleware` gave the request."""
    found: str = request.scope.get("state", {}).get("request_id", "unknown")
    return found


def bug_body(request: Request) -> dict[str, dict[str, Any]]:
    """OpenAI's error object for an exception that nobody expected."""
    return error_body(
        f"internal error; the server's log has the details of request {request_id(request)}", "server_error"
    )


def install(app: FastAPI) -> None:
    """Register a handler for every kind of failure."""
    app.add_exception_handler(RequestRefused, _refused)
    app.add_exception_handler(CheckpointError, _checkpoint)
    app.add_exception_handler(AdaptdError, _failed)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(ClientDisconnect, _gone)
    app.add_exception_handler(Exception, _bug)


async def _refused(request: Request, exc: Exception) -> JSONResponse:
    assert isinstance(exc, RequestRefused)
    _log.info(events.REQUEST_REFUSED, request_id=request_id(request), status=exc.status, code=exc.code or exc.type)
    headers = {} if exc.retry_after_s is None else {"retry-after": str(exc.retry_after_s)}
    if exc.status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(refusal_body(exc), exc.status, headers)


async def _checkpoint(_: Request, exc: Exception) -> JSONResponse:
    status = 404 if isinstance(exc, CheckpointNotFound) else 503 if isinstance(exc, StoreUnavailable) else 409
    code = getattr(exc, "reason", None) or ("checkpoint_not_found" if status == 404 else "store_unavailable")
    type_ = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse(error_body(str(exc), type_, None, code), status)


async def _failed(_: Request, exc: Exception) -> JSONResponse:
    return JSONResponse(error_body(str(exc), "server_error"), 500)


async def _invalid(_: Request, exc: Exception) -> JSONResponse:
    assert isinstance(exc, RequestValidationError)
    param, message = describe(exc.errors())
    return JSONResponse(error_body(message, "invalid_request_error", param), 400)


async def _http(request: Request, exc: Exception) -> JSONResponse:
    assert isinstance(exc, HTTPException)
    message = str(exc.detail)
    if exc.status_code == 404:
        message = f"there is no {request.method} {request.url.path}; see /v1/models, /adaptd/status, /readyz, /metrics"
    elif exc.status_code == 405:
        allowed = (exc.headers or {}).get("allow") or (exc.headers or {}).get("Allow", "another method")
        message = f"{request.url.path} does not take {request.method}; use {allowed}"
    type_ = "invalid_request_error" if exc.status_code < 500 else "server_error"
    return JSONResponse(error_body(message, type_), exc.status_code, exc.headers)


async def _bug(request: Request, exc: Exception) -> JSONResponse:
    # The exception goes on to the server, which logs its traceback; the client learns nothing about the inside. This
    # handler runs outside the middleware that sets x-request-id on every other response.
    _log.error(events.REQUEST_FAILED, request_id=request_id(request), error=type(exc).__name__)
    return JSONResponse(bug_body(request), 500, {"x-request-id": request_id(request)})


async def _gone(_: Request, exc: Exception) -> Response:
    assert isinstance(exc, ClientDisconnect)
    return Response(status_code=499)  # nginx's number for a client that closed; nobody reads it


#: What a parameter with several forms may be; pydantic would complain once per form.
_FORMS = {
    "prompt": "must be text, a list of texts, a list of token ids, or a list of such lists; at most 64 prompts",
    "stop": "must be a string of 1 to 256 characters, or a list of at most 16 of those",
    "tool_choice": "must be auto or none",
}


def describe(errors: Sequence[Mapping[str, Any]]) -> tuple[str | None, str]:
    """The parameter and one sentence for the first of pydantic's complaints: value and rule, never a client's text."""
    first = errors[0]
    location = [part for part in first["loc"] if part not in ("body", "query", "path")]
    if first["type"] == "json_invalid":
        position = location[0] if location else 0
        return None, f"the body is not valid JSON: {first['ctx']['error']} at character {position}"
    param = next((part for part in location if isinstance(part, str)), None)
    if param is None:
        return None, "the body must be a JSON object sent with content-type: application/json"
    rule = first["msg"][:1].lower() + first["msg"][1:]
    if param in _FORMS and first["type"] != "missing":
        return param, f"{param} {_FORMS[param]}"
    return param, f"{_path(location)}{_shown(param, first)}: {rule}"


def _path(location: Sequence[str | int]) -> str:
    """`messages[0].content`; what follows `content` are pydantic's names for its forms."""
    end = location.index("content") + 1 if "content" in location else len(location)
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location[:end]).lstrip(".")


def _shown(param: str, error: Mapping[str, Any]) -> str:
    value = error.get("input")
    if error["type"] == "missing" or param in _PRIVATE or not isinstance(value, str | int | float | bool | None):
        return ""
    return f" ({str(value)[:60]})"
