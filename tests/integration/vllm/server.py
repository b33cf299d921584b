"""A real vLLM server process."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import httpx
import pytest

from tests.integration.vllm.helpers import K

#: A busy machine takes minutes to import vLLM.
_START_S = 900.0


def _die_with_parent() -> None:
    """Ask the kernel to end the server when the tests are killed: a fixture's end does not come then."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


class VllmServer:
    """One server process on a free loopback port."""

    def __init__(self, home: Path, plugin: Path, target: str, draft: Path, log: Path, fault: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = log
        self.fault = fault
        self._process: subprocess.Popen[bytes] | None = None
        speculative = f'{{"method": "draft_model", "model": "{draft}", "num_speculative_tokens": {K}}}'
        self._command = [
            *(str(home / "bin" / "vllm"), "serve", target, "--served-model-name", "pocket"),
            *("--host", "127.0.0.1", "--port", str(self.port), "--dtype", "float32", "--max-model-len", "512"),
            *("--enforce-eager", "--max-num-seqs", "16", "--max-logprobs", "32"),
            *("--speculative-config", speculative, "--weight-transfer-config", '{"backend": "adaptd_disk"}'),
            *("--per-request-spec-decode-metrics", "detailed"),
            *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
        ]
        self._environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("ADAPTD_")},
            "PYTHONPATH": str(plugin),
            "PATH": f"{home / 'bin'}:{os.environ['PATH']}",
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "PLANTED_FAULT": str(fault),
        }

    def start(self) -> None:
        """Start, and wait until it is healthy."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                # The learner's: server and learner then get equal shares of a few cores.
                ["nice", "-n", "10", *self._command],
                env=self._environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                break
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{self.url}/health", timeout=2).status_code == 200:
                    return
            time.sleep(0.5)
        self.stop()
        pytest.fail(f"vLLM did not start:\n{self._log.read_text(errors='replace')[-4000:]}")

    def label(self) -> str:
        """Of the draft's weights; `default` until an update."""
        return str(httpx.get(f"{self.url}/weight_info", timeout=10).json()["weight_version"])

    def to_day_zero(self) -> None:
        """Start again if a draft was brought in."""
        if self.label() != "default":
            self.stop()
            self.start()

    def stop(self) -> None:
        """Stop it and all its processes."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(30)
        self._process = None

    def kill(self) -> None:
        """As the kernel would, the whole group at once."""
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(30)
        self._process = None

    def resident_bytes(self) -> int:
        """Memory of all its processes, as the kernel counts it."""
        assert self._process is not None
        pages = 0
        for folder in Path("/proc").iterdir():
            if not folder.name.isdigit():
                continue
            with contextlib.suppress(OSError):
                # The group is the third field behind the name, which may hold spaces.
                group = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[2])
                if group == self._process.pid:
                    pages += int((folder / "statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def log(self) -> str:
        """What it has written."""
        return self._log.read_text(errors="replace")
