"""`adaptd serve` with engine.kind vllm as people run it: real server, real Ray, real Redis, the real openai client."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.integration.waiting import waiter

wait_for = waiter(300)

pytestmark = [pytest.mark.vllm, pytest.mark.ray, pytest.mark.redis, pytest.mark.slow]

COMMAND = [sys.executable, "-m", "adaptd.cli.main"]
SETTINGS = {
    "ADAPTD_ENGINE__KIND": "vllm",
    "ADAPTD_SERVER__PORT": "0",
    "ADAPTD_UPSTREAM__CAPTURE_BUDGET": "1.0",
    "ADAPTD_UPSTREAM__POLL_S": "0.5",
    "ADAPTD_LEARN__MIN_NEW_TRACES": "8",
    "ADAPTD_LEARN__STEPS_PER_TICK": "4",
    "ADAPTD_LEARN__BATCH_TRACES": "8",
    "ADAPTD_CAPTURE__RESERVED_SHARE": "0.3",
    "ADAPTD_GATE__MIN_TRACES": "3",
    "ADAPTD_LOG__STYLE": "json",
}


class Served:
    """A running daemon and how to reach it."""

    def __init__(self, home: Path, upstream: str) -> None:
        self.env = {**os.environ, **SETTINGS, "ADAPTD_STATE_DIR": str(home), "ADAPTD_UPSTREAM__URL": upstream}
        self.log = (home / "serve.log").open("w")
        self.process = subprocess.Popen([*COMMAND, "serve"], env=self.env, stderr=self.log, stdout=self.log)
        address = home / "default" / "daemon.json"
        deadline = time.monotonic() + 300
        while not address.is_file():
            assert self.process.poll() is None, Path(self.log.name).read_text()[-3000:]
            assert time.monotonic() < deadline, Path(self.log.name).read_text()[-3000:]
            time.sleep(0.25)
        self.url = json.loads(address.read_text())["url"]
        wait_for("the probe", lambda: self.status()["upstream"]["models"], 300)
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", timeout=60, max_retries=0)

    def cli(self, *args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*COMMAND, *args], env=self.env, capture_output=True, text=True, timeout=60, check=False)

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = httpx.get(f"{self.url}/adaptd/status", timeout=30).json()
        return found

    def ask(self, text: str, **options: Any) -> Any:
        return self.client.chat.completions.create(
            model="pocket", messages=[{"role": "user", "content": text}], max_tokens=32, temperature=0, **options
        )


@pytest.fixture(scope="module")
def served(vllm: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    daemon = Served(tmp_path_factory.mktemp("sidecar"), vllm.url)
    yield daemon
    if daemon.process.poll() is None:
        daemon.process.kill()


def test_traffic_becomes_acceptance_and_traces(served: Served) -> None:
    for i in range(12):
        answer = served.ask(f"What causes asthma in case {i}?", extra_headers={"x-adaptd-domain": "medical"})
        assert answer.choices[0].logprobs is None
    parts = list(served.ask("What causes asthma?", stream=True, extra_headers={"x-adaptd-domain": "medical"}))
    assert all(part.usage is None for part in parts)
    found = wait_for("thirteen traces", lambda: (s := served.status())["decoders"][0]["writer"]["written"] >= 13 and s)
    now = found["acceptance"]["domains"]["medical"]["now"]
    assert now["requests"] == 13
    assert 1.0 < now["mal"] <= 5.0
    assert len(now["by_depth"]) == 4
    assert found["k"] == 4
    assert found["upstream"]["up"]
    assert not found["publisher"]["active"]
    assert sum(found["buffer"]["sizes"].values()) >= 13


def test_its_acceptance_is_the_servers_own(vllm: Any, served: Served) -> None:
    """By vLLM's Prometheus counters over the same requests."""

    def theirs() -> tuple[float, float]:
        text = httpx.get(f"{vllm.url}/metrics", timeout=10).text
        found = [
            sum(float(v) for v in re.findall(rf"^vllm:spec_decode_{name}_total{{.*}} ([0-9.e+]+)$", text, re.M))
            for name in ("num_drafts", "num_accepted_tokens")
        ]
        return found[0], found[1]

    before = theirs()
    for i in range(6):
        served.ask(f"Ann has {i + 3} apples and buys 4. How many?", extra_headers={"x-adaptd-domain": "counted"})
    wait_for("six requests", lambda: served.status()["acceptance"]["domains"]["counted"]["now"]["requests"] == 6)
    drafts, accepted = (after - first for after, first in zip(theirs(), before, strict=True))
    mine = served.status()["acceptance"]["domains"]["counted"]["now"]
    assert mine["rounds"] == drafts
    assert mine["mal"] == pytest.approx(1 + accepted / drafts)


def test_it_learns_from_what_it_passes(served: Served) -> None:
    for i in range(12):
        served.ask(f"Ann has {i + 2} apples and buys 3 more. How many?", extra_headers={"x-adaptd-domain": "math"})
    ticks = wait_for(
        "a tick", lambda: [t for t in (served.status()["learner"] or {}).get("history", []) if t["loss"]], 300
    )
    assert ticks[0]["steps"] == 4
    # Fewer once there is nothing to learn, and then the first tick is not the last.
    assert 1 <= ticks[-1]["steps"] <= 4
    assert ticks[-1]["verdict"]["reason"]


def test_opting_out_keeps_a_request_out_of_the_buffer(served: Served) -> None:
    def appended() -> int:
        return int(served.status()["decoders"][0]["writer"]["appended"])

    time.sleep(1)
    before = appended()
    served.ask("Private question", extra_headers={"x-adaptd-no-store": "1"})
    served.ask("Public question")
    wait_for("the public one", lambda: appended() == before + 1, 10)
    assert served.status()["proxy"]["uncaptured"]["opted out"] == 1


def test_status_metrics_and_probes_work_as_for_the_native_engine(served: Served) -> None:
    shown = served.cli("status")
    assert shown.returncode == 0, shown.stderr
    assert "medical" in shown.stdout
    assert "versions stay in the store" in shown.stdout
    metrics = httpx.get(f"{served.url}/metrics", timeout=10).text
    assert re.search(r'adaptd_requests_total\{domain="medical"\} 13\.0', metrics)
    assert "adaptd_upstream_up 1.0" in metrics
    assert "adaptd_proxy_faults_total 0.0" in metrics
    assert httpx.get(f"{served.url}/livez").status_code == httpx.get(f"{served.url}/readyz").status_code == 200
    assert "adaptd" in httpx.get(f"{served.url}/").text
    assert httpx.get(f"{served.url}/v1/models").json()["data"][0]["id"] == "pocket"
    with pytest.raises(openai.BadRequestError, match=r"maximum context length|longer than"):
        served.ask("word " * 900)


def test_a_dead_redis_and_a_dead_learner_cost_no_request(served: Served) -> None:
    victims = []
    for pid in subprocess.run(
        ["pgrep", "-f", "redis-server unixsocket|ray::LearnerActor"], capture_output=True, text=True, check=False
    ).stdout.split():
        try:
            # Redis writes its title over its environment.
            about = b"".join(Path(f"/proc/{pid}/{what}").read_bytes() for what in ("environ", "cmdline"))
        except OSError:
            continue
        if served.env["ADAPTD_STATE_DIR"].encode() in about:
            victims.append(int(pid))
    assert len(victims) >= 2, "Redis and the learner"
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    for i in range(8):
        assert served.ask(f"Are you there, {i}?").choices[0].message.content is not None
    assert served.status()["proxy"]["faults"] == 0


def test_prompt_text_is_in_no_log(served: Served) -> None:
    served.ask("xylophone-quagmire secret phrase")
    assert "xylophone" not in Path(served.log.name).read_text()


def test_sigterm_waits_for_the_answer_in_flight(served: Served) -> None:
    """Last in the file."""
    stream = served.ask("What causes asthma?", stream=True, extra_body={"ignore_eos": True, "max_tokens": 300})
    next(stream)
    served.process.send_signal(signal.SIGTERM)
    parts = list(stream)
    assert parts[-1].choices[0].finish_reason == "length"
    assert served.process.wait(timeout=60) == 0
    served.log.close()
