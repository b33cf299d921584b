"""A vLLM server's weight-update routes as one state machine, with the error bodies of 0.32; faults are planted by route."""

from __future__ import annotations

import json
from typing import Any

import httpx

ACCEPTED = {0: 1, 1: 3}
"""Accepted proposals of four a round, by version."""


class FakeVllm:
    """`handler` goes into `httpx.MockTransport`; `log` lists the routes that were called."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.faults: dict[str, list[httpx.Response | Exception]] = {}
        self.config: dict[str, Any] = {}
        self.tokens: list[int] = []
        self.restart()

    def restart(self) -> None:
        """Everything a process forgets."""
        self.started_at = getattr(self, "started_at", 1000.0) + 1.0
        self.label, self.paused, self.session, self.sleeps = "default", False, False, False
        self.draft = 0
        self.target = {"tp0:model.embed_tokens.weight": "aa", "tp0:model.norm.weight": "bb"}
        self.drafted = self.accepted = self.drafts = 0
        self.folder: str | None = None
        self.was_paused_at_update: list[bool] = []

    def fail(self, route: str, *answers: httpx.Response | Exception) -> None:
        """The next calls of a route end like this."""
        self.faults.setdefault(route, []).extend(answers)

    def handler(self, request: httpx.Request) -> httpx.Response:
        route = request.url.path
        self.log.append(route)
        if planted := self.faults.get(route):
            answer = planted.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer
        body = json.loads(request.content) if request.content else {}
        method = getattr(self, route.strip("/").replace("/", "_"), None)
        if method is None:
            return httpx.Response(404, json={"detail": "Not Found"})
        found = method(body, request)
        return found if isinstance(found, httpx.Response) else httpx.Response(200, json=found)

    def pause(self, body: Any, request: httpx.Request) -> Any:
        assert request.url.params["mode"] == "keep", "the route's default aborts every request"
        self.paused = True
        return {"status": "paused"}

    def resume(self, body: Any, request: httpx.Request) -> Any:
        self.paused = False
        return {"status": "resumed"}

    def init_weight_transfer_engine(self, body: Any, request: httpx.Request) -> Any:
        self.folder = body["init_info"]["folder"]
        return {"message": "Weight transfer initialized"}

    def start_draft_weight_update(self, body: Any, request: httpx.Request) -> Any:
        if self.session:
            return error("start_weight_update called while a weight update is already active.")
        self.session = True
        return {"message": "Draft weight update started"}

    def update_weights(self, body: Any, request: httpx.Request) -> Any:
        if not self.session:
            return error("start_weight_update must be called before update_weights.")
        self.was_paused_at_update.append(self.paused)
        self.draft = int(body["update_info"]["path"].rsplit("/v", 1)[1].split(".")[0])
        return {"message": "Weights updated"}

    def finish_weight_update(self, body: Any, request: httpx.Request) -> Any:
        if not self.session:
            return error("finish_weight_update called without a matching start_weight_update.")
        self.session = False
        self.label = body["weight_version"] or self.label
        return {"message": "Weight update finished"}

    def weight_info(self, body: Any, request: httpx.Request) -> Any:
        return {"weight_version": self.label}

    def server_info(self, body: Any, request: httpx.Request) -> Any:
        assert request.url.params["config_format"] == "json"
        return {"vllm_config": self.config}

    def tokenize(self, body: Any, request: httpx.Request) -> Any:
        return {"tokens": self.tokens, "count": len(self.tokens)}

    def is_paused(self, body: Any, request: httpx.Request) -> Any:
        return {"is_paused": self.paused}

    def is_sleeping(self, body: Any, request: httpx.Request) -> Any:
        return {"is_sleeping": self.sleeps}

    def weight_checker(self, body: Any, request: httpx.Request) -> Any:
        return {"checksums": dict(self.target)}

    def metrics(self, body: Any, request: httpx.Request) -> httpx.Response:
        lines = [
            "# TYPE process_start_time_seconds gauge",
            f"process_start_time_seconds {self.started_at}",
        ]
        counts = {"drafts": self.drafts, "draft_tokens": self.drafted, "accepted_tokens": self.accepted}
        for name, value in counts.items():
            lines.append(f"# TYPE vllm:spec_decode_num_{name}_total counter")
            lines.append(f'vllm:spec_decode_num_{name}_total{{engine="0",model_name="m"}} {value}')
        return httpx.Response(200, text="\n".join(lines) + "\n")

    def v1_models(self, body: Any, request: httpx.Request) -> Any:
        return {"data": [{"id": "m"}]}

    def v1_completions(self, body: Any, request: httpx.Request) -> Any:
        rounds, accepted = 5, 5 * ACCEPTED.get(self.draft, 0)
        found = {"num_spec_steps": rounds, "num_draft_tokens": 4 * rounds, "num_accepted_draft_tokens": accepted}
        return {"choices": [{"token_ids": body["prompt"]}], "metrics": {"speculative_decoding": found}}


def error(message: str, status: int = 500) -> httpx.Response:
    """An error as vLLM words it."""
    text = f"Call to collective_rpc method failed: Worker failed with error '{message}', please check the stack trace"
    return httpx.Response(status, json={"error": {"message": text, "type": "InternalServerError", "code": status}})
