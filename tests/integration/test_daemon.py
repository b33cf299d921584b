"""The daemon as people run it: `adaptd serve` with real Ray, a real Redis, the pocket pair and the real openai client."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from tests.integration.waiting import waiter

wait_for = waiter(90)

pytestmark = [pytest.mark.ray, pytest.mark.redis]

START_S = 180
COMMAND = [sys.executable, "-m", "adaptd.cli.main"]
SETTINGS = {
    "ADAPTD_SERVER__PORT": "0",
    "ADAPTD_SERVER__ADMIN_TOKEN": "hush",
    "ADAPTD_ENGINE__MAX_LENGTH": "320",
    "ADAPTD_LEARN__MIN_NEW_TRACES": "8",
    "ADAPTD_LEARN__STEPS_PER_TICK": "4",
    "ADAPTD_LEARN__BATCH_TRACES": "8",
    "ADAPTD_CAPTURE__RESERVED_SHARE": "0.2",
    "ADAPTD_LOG__STYLE": "json",
}


class Served:
    """A running daemon and how to reach it."""

    def __init__(self, home: Path, **settings: str) -> None:
        self.env = {**os.environ, **SETTINGS, **settings, "ADAPTD_STATE_DIR": str(home)}
        self.log = (home / "serve.log").open("w")
        self.process = subprocess.Popen([*COMMAND, "serve"], env=self.env, stderr=self.log, stdout=self.log)
        address = home / "default" / "daemon.json"
        deadline = time.monotonic() + START_S
        while not address.is_file():
            assert self.process.poll() is None, Path(self.log.name).read_text()[-3000:]
            assert time.monotonic() < deadline, Path(self.log.name).read_text()[-3000:]
            time.sleep(0.25)
        self.url = json.loads(address.read_text())["url"]
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", timeout=60, max_retries=0)

    def cli(self, *args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*COMMAND, *args], env=self.env, capture_output=True, text=True, timeout=60, check=False)

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = httpx.get(f"{self.url}/adaptd/status", timeout=30).json()
        return found

    def ask(self, text: str, **options: Any) -> Any:
        return self.client.chat.completions.create(
            model="adaptd", messages=[{"role": "user", "content": text}], max_tokens=24, **options
        )

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(timeout=60)
        self.log.close()
        return code


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    daemon = Served(tmp_path_factory.mktemp("daemon"))
    yield daemon
    if daemon.process.poll() is None:
        daemon.process.kill()


def test_chat_streams_and_gives_the_same_text_as_without_streaming(served: Served) -> None:
    whole = served.ask("What causes asthma?", temperature=0.0)
    parts = list(served.ask("What causes asthma?", temperature=0.0, stream=True))
    assert whole.usage.completion_tokens > 0
    assert "".join(p.choices[0].delta.content or "" for p in parts if p.choices) == whole.choices[0].message.content
    assert len(parts) > 3, "a stream arrives in pieces"


def test_a_seed_repeats_an_answer_and_completions_take_plain_text(served: Served) -> None:
    answers = [
        served.client.completions.create(model="adaptd", prompt="The symptoms", max_tokens=16, temperature=1.0, seed=3)
        for _ in range(2)
    ]
    assert answers[0].choices[0].text == answers[1].choices[0].text


def test_bad_requests_are_refused_by_name(served: Served) -> None:
    with pytest.raises(openai.NotFoundError, match="no-such-model"):
        served.client.completions.create(model="no-such-model", prompt="x", max_tokens=4)
    with pytest.raises(openai.BadRequestError, match=r"\d+ tokens"):
        served.ask("word " * 600)
    with pytest.raises(openai.BadRequestError):
        served.client.completions.create(model="adaptd", prompt="", max_tokens=4)
    answer = httpx.post(f"{served.url}/v1/completions", content=b"{", headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


@pytest.mark.skipif(sys.platform != "linux", reason="niceness of another process's threads, as Linux shows it")
def test_decoders_keep_their_priority_and_the_learner_gives_way(served: Served) -> None:
    def niceness(actor: str) -> int:
        found = [p for p in psutil.Process(served.process.pid).children(recursive=True) if f"::{actor}" in p.name()]
        assert len(found) == 1, found
        return int(found[0].nice())

    own = os.nice(0)
    assert niceness("DecoderActor") == own
    assert niceness("LearnerActor") == min(19, own + 10)


def test_status_and_metrics_show_the_traffic(served: Served) -> None:
    headers = {"x-adaptd-domain": "medical"}
    for i in range(6):
        served.ask("What is diabetes?", temperature=0.8, seed=i, extra_headers=headers)
    shown = served.cli("status")
    assert shown.returncode == 0, shown.stderr
    assert "medical" in shown.stdout
    found = json.loads(served.cli("status", "--json").stdout)
    assert found["acceptance"]["domains"]["medical"]["now"]["requests"] == 6
    assert found["acceptance"]["domains"]["medical"]["now"]["mal"] >= 1.0
    economics = wait_for("timed passes", lambda: (e := served.status()["economics"])["c_d"] is not None and e)
    assert 0 < economics["c_d"] < 5
    assert economics["c_v"] >= 0
    assert economics["speedup"] == economics["measured"] or economics["measured"] is None
    assert "speculation" in served.cli("status").stdout
    metrics = httpx.get(f"{served.url}/metrics").text
    assert "adaptd_draft_cost_ratio" in metrics
    assert re.search(r'adaptd_requests_total\{domain="medical"\} 6\.0', metrics)
    assert httpx.get(f"{served.url}/livez").status_code == httpx.get(f"{served.url}/readyz").status_code == 200


def test_status_since_shows_how_it_came_about(served: Served) -> None:
    served.ask("What is diabetes?", extra_headers={"x-adaptd-domain": "medical"})
    trends = json.loads(served.cli("status", "--since", "15m", "--json").stdout)["trends"]
    assert (trends["since"], trends["step_s"]) == ("15m", 60)
    asked = trends["domains"]["medical"]["requests"]
    assert len(asked) == len(trends["at"])
    assert trends["summary"]["medical"]["requests"] == sum(asked) > 0
    assert sum(trends["domains"]["all"]["requests"]) >= sum(asked)
    assert trends["summary"]["medical"]["mal"] >= 1.0
    wait_for("traces by token group", lambda: _judged(served) > 0)
    shown = served.cli("status", "--since", "1h")
    assert shown.returncode == 0, shown.stderr
    assert "trends since 1h" in shown.stdout
    assert "trends" not in served.status()
    out = Path(served.log.name).parent / "report"
    page = served.cli("report", "--since", "1h", "--out", str(out), "--json", str(out / "report.json"))
    assert page.returncode == 0, page.stderr
    assert "Tokens rejected most" in (out / "report.html").read_text()
    found = json.loads((out / "report.json").read_text())
    assert sum(found["tokens"]["traces"].values()) > 0
    assert found["tokens"]["top_proposed"][0]["rejected"] > 0
    refused = served.cli("status", "--since", "yesterday")
    assert refused.returncode == 2
    assert "such as 7d" in refused.stderr
    answer = httpx.get(f"{served.url}/adaptd/status", params={"since": "7 parsecs"})
    assert answer.status_code == 400
    assert "parsecs" in answer.json()["error"]["message"]


def _judged(served: Served) -> int:
    served.ask("What is asthma?")
    found = httpx.get(f"{served.url}/adaptd/status", params={"since": "15m"}, timeout=30).json()["trends"]
    return sum(group["judged"] for group in found["summary"]["all"]["by_group"].values())


def test_opting_out_keeps_a_request_out_of_the_buffer(served: Served) -> None:
    def inserted() -> int:
        return sum(d["writer"]["appended"] for d in served.status()["decoders"])

    def none_held() -> bool:
        return not any(d["engine"]["held"] for d in served.status()["decoders"])

    wait_for("the alternatives of earlier answers", none_held)
    before = inserted()
    served.ask("Private question", extra_headers={"x-adaptd-no-store": "1"})
    assert none_held(), "nothing of it waits to be stored later"
    assert inserted() == before
    served.ask("Public question")
    wait_for("the alternatives of the public one", none_held)
    assert inserted() == before + 1


def test_it_learns_from_the_traffic_it_serves(served: Served) -> None:
    for i in range(40):
        served.ask(f"Ann has {i + 2} apples and buys 3 more. How many?", temperature=0.8, seed=i)
    ticks = wait_for("a learner tick", lambda: [t for t in served.status()["learner"]["history"] if t["loss"]])
    # The first one: a tick that gains nothing takes fewer steps next time.
    assert ticks[0]["steps"] == 4
    assert ticks[-1]["verdict"]["reason"]


def test_administration_needs_the_token(served: Served) -> None:
    assert httpx.post(f"{served.url}/adaptd/checkpoints/rollback", json={}).status_code == 401
    bad = {"authorization": "Bearer wrong"}
    assert httpx.post(f"{served.url}/adaptd/checkpoints/rollback", json={}, headers=bad).status_code in (401, 403)


def test_a_dead_decoder_fails_its_requests_with_a_retryable_error_and_comes_back(served: Served) -> None:
    """kill -9 of the actor's process while it answers: an error in bounded time, never a hang; then service again."""
    outcome: list[Any] = []

    def client() -> None:
        try:
            outcome.append(
                served.client.completions.create(
                    model="adaptd", prompt="Once", max_tokens=280, temperature=1.0, extra_body={"ignore_eos": True}
                )
            )
        except openai.OpenAIError as error:
            outcome.append(error)

    thread = threading.Thread(target=client)
    thread.start()
    wait_for("the request in flight", lambda: served.status()["in_flight"])
    pids = subprocess.run(
        ["pgrep", "-f", "ray::DecoderActor"], capture_output=True, text=True, check=True
    ).stdout.split()
    ours = [int(pid) for pid in pids if _descends_from_session(int(pid), served)]
    assert ours
    for pid in ours:
        os.kill(pid, signal.SIGKILL)
    thread.join(timeout=60)
    assert not thread.is_alive(), "the request hangs"
    assert isinstance(outcome[0], openai.APIStatusError)
    assert outcome[0].status_code == 503

    def answered() -> bool:
        try:
            return bool(served.ask("Are you back?").choices)
        except openai.OpenAIError:
            return False

    wait_for("the decoder to come back", answered, 120)
    assert served.status()["decoders_lost"] >= 1


def _descends_from_session(pid: int, served: Served) -> bool:
    """Whether the process belongs to this test's cluster: another test or program may run one too."""
    environ = Path(f"/proc/{pid}/environ").read_bytes()
    return served.env["ADAPTD_STATE_DIR"].encode() in environ


def test_prompt_text_is_in_no_log(served: Served) -> None:
    served.ask("xylophone-quagmire secret phrase")
    assert "xylophone" not in Path(served.log.name).read_text()


def test_a_second_daemon_on_the_same_folder_is_refused(served: Served) -> None:
    second = served.cli("serve")
    assert second.returncode == 78
    assert "another daemon runs" in second.stderr


def test_sigterm_drains_and_exits_zero(served: Served) -> None:
    """Last in the file: the request in flight is answered, then the process ends by itself."""
    answers: list[Any] = []
    thread = threading.Thread(
        target=lambda: answers.append(
            served.client.completions.create(
                model="adaptd", prompt="Twice", max_tokens=120, extra_body={"ignore_eos": True}
            )
        )
    )
    thread.start()
    wait_for("the request in flight", lambda: served.status()["in_flight"])
    started = time.monotonic()
    assert served.stop() == 0
    assert time.monotonic() - started < 30
    thread.join(timeout=10)
    assert answers
    assert answers[0].usage.completion_tokens == 120
    gone = served.cli("status")
    assert gone.returncode == 69
    assert "no adaptd daemon runs" in gone.stderr
