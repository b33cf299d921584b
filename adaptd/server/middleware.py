"""Around every request: its id on the way in and out, and a bound on its body. Plain ASGI, so streams stay unbuffered."""

from __future__ import annotations

import re
import uuid
from collections.abc import MutableMapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

#: A client's request id is kept if it is printable and short, else replaced: it goes into headers and logs.
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


class RequestContext:
    """Gives every request an id (`scope["state"]["request_id"]`), echoes it as x-request-id, and bounds the body.

    Args:
        app: the application inside.
        max_body_bytes: a longer body is refused with 413, without being read to its end.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self._app, self._max_body_bytes = app, max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else f"req-{uuid.uuid4().hex}"
        state: MutableMapping[str, Any] = scope.setdefault("state", {})
        state["request_id"] = request_id
        received = 0

        async def bounded_receive() -> Message:
            nonlocal received
            message = await receive()
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                announced = headers.get("content-length", "0")
                if received > self._max_body_bytes or (announced.isdecimal() and int(announced) > self._max_body_bytes):
                    raise HTTPException(413, f"the body is longer than {self._max_body_bytes} bytes; send less")
            return message

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        await self._app(scope, bounded_receive, send_with_id)
