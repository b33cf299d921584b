"""`adaptd serve` with engine.kind vllm in front of a fake server: the composition, without a vLLM to install.

The fake answers every chat with the same tokens and acceptance; what the real one does is tested in
tests/integration/vllm/.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.integration.waiting import waiter

wait_for = waiter(120)

pytestmark = [pytest.mark.ray, pytest.mark.redis]

COMMAND = [sys.executable, "-m", "adaptd.cli.main"]
TOKENS = [534, 1155, 281, 94]
K = 3


class FakeServer(BaseHTTPRequestHandler):
    """As much of vLLM as the daemon looks at."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Quiet."""

    def _answer(self, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        known: dict[str, Any] = {
            "/health": {},
            "/version": {"version": "fake"},
            "/v1/models": {"data": [{"id": "m", "root": "r", "parent": None}]},
        }
        self._answer(known[self.path])

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path == "/tokenize":
            self._answer({"tokens": list(asked["prompt"].encode())})
            return
        chat = "chat" in self.path
        depth = asked.get("top_logprobs" if chat else "logprobs") or 0
        ids = TOKENS[: asked["max_tokens"]]
        named = asked.get("return_tokens_as_token_ids")
        rows = [{(f"token_id:{i + d}" if named else f"t{i}{d}"): -0.7 - d for d in range(depth)} for i in ids]
        logprobs: Any = None
        if depth and chat:
            tops = [[{"token": n, "logprob": v} for n, v in row.items()] for row in rows]
            logprobs = {"content": [{**top[0], "top_logprobs": top} for top in tops]}
        elif depth:
            first = [next(iter(row)) for row in rows]
            logprobs = {"tokens": first, "token_logprobs": [-0.7] * len(rows), "top_logprobs": rows}
        back = asked.get("return_token_ids")
        choice = {
            "index": 0,
            **({"message": {"content": "x"}} if chat else {"text": "x"}),
            "logprobs": logprobs,
            "finish_reason": "length",
            "token_ids": ids if back else None,
            "prompt_token_ids": [1, 4] if back else None,
        }
        speculative = {
            "num_spec_steps": 1,
            "num_draft_tokens": K,
            "num_accepted_draft_tokens": 2,
            "num_spec_tokens": K,
            "per_step_accepted": [2],
            "per_step_drafted": [K],
        }
        answer = {
            "id": f"chatcmpl-{time.monotonic_ns()}",
            "choices": [choice],
            "usage": {"completion_tokens": len(ids)},
            "metrics": {"speculative_decoding": speculative},
        }
        if not asked.get("stream"):
            self._answer(answer)
            return
        options = asked.get("stream_options") or {}
        events = [{k: v for k, v in answer.items() if k not in ("usage", "metrics")}]
        events += [{**answer, "choices": []}] if options.get("include_usage") else []
        body = "".join(f"data: {json.dumps(e)}\n\n" for e in events).encode() + b"data: [DONE]\n\n"
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture(scope="module")
def upstream() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_the_sidecar_serves_captures_learns_and_stops(upstream: str, tmp_path: Path) -> None:
    env = {
        **os.environ,
        "ADAPTD_ENGINE__KIND": "vllm",
        "ADAPTD_STATE_DIR": str(tmp_path),
        "ADAPTD_SERVER__PORT": "0",
        "ADAPTD_UPSTREAM__URL": upstream,
        "ADAPTD_UPSTREAM__CAPTURE_SHARE": "1.0",
        "ADAPTD_LEARN__MIN_NEW_TRACES": "4",
        "ADAPTD_LEARN__STEPS_PER_TICK": "2",
        "ADAPTD_LOG__STYLE": "json",
    }
    log = (tmp_path / "serve.log").open("w")
    process = subprocess.Popen([*COMMAND, "serve"], env=env, stderr=log, stdout=log)
    try:
        address = tmp_path / "default" / "daemon.json"
        wait_for("the daemon", lambda: process.poll() is not None or address.is_file(), 240)
        assert process.poll() is None, (tmp_path / "serve.log").read_text()[-3000:]
        url = json.loads(address.read_text())["url"]
        client = httpx.Client(base_url=url, timeout=30)
        body = {"model": "m", "messages": [{"role": "user", "content": "secret"}], "max_tokens": 4, "temperature": 0}
        for i in range(12):
            answer = client.post(
                "/v1/chat/completions", json={**body, "stream": bool(i % 2)}, headers={"x-adaptd-domain": "math"}
            )
            assert answer.status_code == 200
            assert "token_id:" not in answer.text
            assert '"usage"' not in answer.text or not i % 2
        assert client.post("/v1/chat/completions", json=body, headers={"x-adaptd-no-store": "1"}).status_code == 200

        def status() -> dict[str, Any]:
            found: dict[str, Any] = client.get("/adaptd/status").json()
            return found

        found = wait_for("twelve traces", lambda: (s := status())["decoders"][0]["writer"]["written"] == 12 and s)
        assert found["k"] == K, "the server's, not the configuration's"
        now = found["acceptance"]["domains"]["math"]["now"]
        assert (now["requests"], now["mal"], now["by_depth"]) == (12, 3.0, [1.0, 1.0, 0.0])
        assert found["proxy"]["uncaptured"] == {"opted out": 1}
        assert found["proxy"]["faults"] == 0
        wait_for("a tick", lambda: (status()["learner"] or {}).get("steps", 0) >= 2, 300)
        shown = subprocess.run([*COMMAND, "status"], env=env, capture_output=True, text=True, timeout=60, check=False)
        assert shown.returncode == 0, shown.stderr
        assert "versions stay in the store" in shown.stdout
        assert found["publisher"]["active"] is False
        assert "adapt.gated: false" in found["publisher"]["reason"]
        metrics = client.get("/metrics").text
        assert 'adaptd_requests_total{domain="math"} 12.0' in metrics
        assert 'adaptd_proxy_uncaptured_total{reason="opted out"} 1.0' in metrics
        assert re.search(r'adaptd_publisher_active\{server="http[^"]+"\} 0\.0', metrics)
        trends = client.get("/adaptd/status", params={"since": "1h"}).json()["trends"]["summary"]["math"]
        assert (trends["requests"], trends["mal"], [d["acceptance"] for d in trends["by_depth"]]) == (
            12,
            3.0,
            [1, 1, 0],
        )
        assert (
            sum(b["judged"] for b in trends["by_entropy"]) == sum(g["judged"] for g in trends["by_group"].values()) > 0
        )
        page = ["report", "--since", "1h", "--out", str(tmp_path / "report")]
        shown = subprocess.run([*COMMAND, *page], env=env, capture_output=True, text=True, timeout=60, check=False)
        assert shown.returncode == 0, shown.stderr
        assert "What the target wanted" in (tmp_path / "report" / "report.html").read_text()
        assert client.get("/readyz").status_code == 200
        assert client.post("/update_weights").status_code == 403
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
        assert "secret" not in (tmp_path / "serve.log").read_text()
    finally:
        if process.poll() is None:
            process.kill()
        log.close()
