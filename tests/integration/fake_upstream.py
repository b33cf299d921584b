"""A server that looks like vLLM to the proxy, as an ASGI application; as a program it listens on a port.

Its draft is a number of accepted proposals that `POST /fake/publish` sets, so a "version" can be good or ruined.
"""

import json
import sys
from typing import Any

import httpx
from starlette.types import Receive, Scope, Send

from tests.unit.sidecar.test_upstream import FakeVllm

ROUNDS, K = 10, 4


class FakeUpstream(FakeVllm):
    """One server: name of its target, tokens drafted a step, tokenizer."""

    def __init__(self, root: str = "r", k: int = K, salt: int = 0, *, forced: bool = False) -> None:
        super().__init__(forced=forced)
        self.root, self.k, self.salt = root, k, salt
        self.draft, self.accepted = 0, 2 * ROUNDS
        self.asked = 0

    def handle(self, request: httpx.Request) -> httpx.Response:
        path = request.url.path
        if path == "/health":
            return httpx.Response(200)
        if path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "m", "root": self.root, "parent": None}]})
        if path == "/tokenize":
            text = json.loads(request.content)["prompt"]
            return httpx.Response(200, json={"tokens": [b + self.salt for b in text.encode()]})
        if path == "/fake/publish":
            found = json.loads(request.content)
            self.draft, self.accepted = found["version"], found["accepted"]
            return httpx.Response(200, json={})
        if path == "/fake/state":
            return httpx.Response(200, json={"draft": self.draft, "asked": self.asked})
        if path == "/metrics":
            return httpx.Response(200, text="")
        self.asked += path.startswith("/v1/") and json.loads(request.content).get("max_tokens", 0) > 8
        answer = super().handle(request)
        if answer.headers["content-type"] != "application/json" or "metrics" not in answer.json():
            return answer
        speculative = {
            "num_spec_steps": ROUNDS,
            "num_draft_tokens": ROUNDS * self.k,
            "num_accepted_draft_tokens": self.accepted,
            "num_spec_tokens": self.k,
        }
        return httpx.Response(200, json={**answer.json(), "metrics": {"speculative_decoding": speculative}})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        answer = self.handle(httpx.Request(scope["method"], f"http://s{scope['path']}", content=body))
        headers = [(n.encode(), v.encode()) for n, v in answer.headers.items()]
        await send({"type": "http.response.start", "status": answer.status_code, "headers": headers})
        await send({"type": "http.response.body", "body": answer.content})


def question(**options: Any) -> dict[str, Any]:
    """Body of a completion that the fake counts as asked for by a client."""
    return {"model": "m", "prompt": "secret", "max_tokens": 16, "temperature": 0, **options}


if __name__ == "__main__":
    import uvicorn

    uvicorn.run(FakeUpstream(), port=int(sys.argv[1]), log_level="error", lifespan="off")
