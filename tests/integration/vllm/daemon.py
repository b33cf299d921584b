"""A real `adaptd serve` process in front of a vLLM server, and clients of it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import openai

from adaptd.sidecar.client import VllmClient
from adaptd.sidecar.metrics import SpecCounters
from tests.integration.waiting import waiter

wait_for = waiter(300)

COMMAND = [sys.executable, "-m", "adaptd.cli.main"]
ROOT = Path(__file__).parents[3]
MAX_TOKENS = 64


class ServedDaemon:
    """`adaptd serve` with configs/vllm.yaml; `settings` are `section.key` over it."""

    def __init__(self, home: Path, upstream: str, settings: Mapping[str, Any] | None = None) -> None:
        self.home = home / "default"
        self.settings = {
            "upstream.url": upstream,
            "server.port": 0,
            "log.style": "json",
            "upstream.capture_budget": 1.0,  # server, learner and clients share the cores: a budget would starve the learner
            "upstream.poll_s": 0.5,
            **(settings or {}),
        }
        self.env = {key: value for key, value in os.environ.items() if not key.startswith("ADAPTD_")}
        self.env["ADAPTD_STATE_DIR"] = str(home)  # by which its processes are found, too
        self.log = home / "serve.log"
        self.process: subprocess.Popen[bytes] | None = None

    def _sets(self) -> list[str]:
        sets = [f"--set={key}={value}" for key, value in self.settings.items()]
        return ["--config", str(ROOT / "configs" / "vllm.yaml"), *sets]

    def start(self, *, probed: bool = True) -> None:
        """Start, and wait until it has announced itself and (`probed`) knows its server."""
        address = self.home / "daemon.json"
        address.unlink(missing_ok=True)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen([*COMMAND, "serve", *self._sets()], env=self.env, stderr=log, stdout=log)
        wait_for("the daemon", lambda: self.process.poll() is not None or address.is_file(), 300)  # type: ignore[union-attr]
        assert self.process.poll() is None, self.log.read_text()[-3000:]
        self.url = json.loads(address.read_text())["url"]
        if probed:
            wait_for("the probe", lambda: self.status()["upstream"]["models"], 300)

    def cli(self, *args: str) -> subprocess.CompletedProcess[str]:
        command = [*COMMAND, *args, *self._sets()]
        return subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=120, check=False)

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = httpx.get(f"{self.url}/adaptd/status", timeout=30).json()
        return found

    def kill(self) -> None:
        """As the kernel would: at once, and only the daemon itself."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(30)

    def stop(self) -> int:
        """SIGTERM; the exit status."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(90)

    def end(self) -> None:
        """Whatever is left, for a fixture."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait(30)

    def processes(self, name: str) -> list[int]:
        """Process ids of this daemon's parts whose command line has `name`."""
        found = []
        for line in subprocess.run(["pgrep", "-f", name], capture_output=True, text=True, check=False).stdout.split():
            try:
                # Redis writes its title over its environment.
                about = b"".join(Path(f"/proc/{line}/{what}").read_bytes() for what in ("environ", "cmdline"))
                if str(self.home.parent).encode() in about:
                    found.append(int(line))
            except OSError:
                continue
        return found


async def chat(
    url: str, questions: Sequence[str], *, concurrency: int = 8, domain: str = "math", max_tokens: int = MAX_TOKENS
) -> list[str]:
    """Greedy answers by the official client, in order; an error of any is the caller's."""
    slots = asyncio.Semaphore(concurrency)
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=120, max_retries=0) as client:

        async def one(question: str) -> str:
            async with slots:
                answer = await client.chat.completions.create(
                    model="pocket",
                    messages=[{"role": "user", "content": question}],
                    max_tokens=max_tokens,
                    temperature=0,
                    extra_headers={"x-adaptd-domain": domain},
                )
                return answer.choices[0].message.content or ""

        return list(await asyncio.gather(*(one(question) for question in questions)))


async def counted(server: str, url: str, questions: Sequence[str], **options: Any) -> tuple[list[str], SpecCounters]:
    """Answers by way of `url`, and what the server's own Prometheus counters say of them."""
    client = VllmClient(server)
    try:
        before = (await client.metrics()).counters
        answers = await chat(url, questions, **options)
        return answers, (await client.metrics()).counters - before
    finally:
        await client.close()
