"""The client's end of an exchange, in ASGI: its body, its leaving, what it is sent, refusals in OpenAI's form."""

from __future__ import annotations

import json

from starlette.types import Message, Receive, Send

_RETRY_S = b"1"


class Sender:
    """Where an answer goes, and whether the client has all of it."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.answered = False
        """The last event of a stream was sent, or is about to be. Many clients leave then, in front of the end of the body."""

    async def __call__(self, message: Message) -> None:
        """Pass it on."""
        await self._send(message)


async def read_body(receive: Receive) -> bytes | None:
    """The whole request body; None if the client left before its end."""
    parts: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


async def gone(receive: Receive) -> None:
    """Ends when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def refuse(send: Send, status: int, message: str, type_: str) -> None:
    """An error in the place of an answer; one of 500 and above may be tried again."""
    body = json.dumps({"error": {"message": message, "type": type_, "param": None, "code": "upstream"}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status >= 500:
        headers.append((b"retry-after", _RETRY_S))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
