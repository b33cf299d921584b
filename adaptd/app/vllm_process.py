"""A vLLM server of the demonstration's own: found, started as docs/swap.md says, and never left running."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx

from adaptd import __version__
from adaptd.errors import UpstreamUnavailable
from adaptd.sidecar import vllm_plugin

#: A busy machine takes minutes to import vLLM.
_START_S = 600.0
_STOP_S = 30.0
_REMEDY = (
    "name the folder of a virtual environment that has it, or its executable, with --vllm (or ADAPTD_VLLM); in a checkout "
    "`make .vllm/.installed` installs the CPU build"
)


def find_vllm(named: Path | None) -> Path:
    """The executable: the named one, or that of the named environment, or `.vllm` here, or on the PATH.

    Raises:
      UpstreamUnavailable: there is none.
    """
    if named is not None:
        for path in (named / "bin" / "vllm", named):
            if path.is_file() and os.access(path, os.X_OK):
                return path.absolute()
        raise UpstreamUnavailable(f"there is no vLLM at {named}: {_REMEDY}")
    local = Path(".vllm/bin/vllm")
    found = str(local.absolute()) if local.is_file() else shutil.which("vllm")
    if found is None:
        raise UpstreamUnavailable(f"there is no vLLM here: {_REMEDY}")
    return Path(found)


def plugin_folder(folder: Path) -> Path:
    """What `pip install --no-deps adaptd` puts into the server's environment, in a folder for its PYTHONPATH."""
    folder.mkdir(parents=True)
    (folder / "adaptd").symlink_to(Path(__file__).parents[1])
    about = folder / f"adaptd-{__version__}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: adaptd\nVersion: {__version__}\n")
    entry = f"adaptd = {vllm_plugin.__name__}:{vllm_plugin.register.__name__}"
    (about / "entry_points.txt").write_text(f"[vllm.general_plugins]\n{entry}\n")
    return folder


@contextlib.contextmanager
def vllm_server(
    program: Path, target: str, draft: Path, plugin: Path, *, k: int, name: str, niceness: int, log: Path
) -> Iterator[str]:
    """Run one on a free loopback port; gives its address. Whatever happens inside, it is stopped afterwards.

    Args:
      program: the executable.
      target, draft: folders; the draft prepared by `adaptd export --prepare`.
      plugin: `plugin_folder`.
      k: tokens proposed a round.
      name: that clients use.
      niceness: of the server; the learner's, where they share cores, or the one starves the other.
      log: file that its output goes to.

    Raises:
      UpstreamUnavailable: it did not start; the message ends with its last lines.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    speculative = {"method": "draft_model", "model": str(draft), "num_speculative_tokens": k}
    command = [
        *(str(program), "serve", target, "--served-model-name", name, "--host", "127.0.0.1", "--port", str(port)),
        *("--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "16", "--enforce-eager"),
        *("--speculative-config", json.dumps(speculative)),
        *("--weight-transfer-config", json.dumps({"backend": vllm_plugin.BACKEND})),
        *("--per-request-spec-decode-metrics", "detailed", "--max-logprobs", "20"),
    ]
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith(("ADAPTD_", "VLLM_"))},
        "PYTHONPATH": str(plugin),
        "PATH": f"{program.parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = ["nice", "-n", str(niceness), *command]
    url = f"http://127.0.0.1:{port}"
    with process(command, environment, log) as running:
        await_health(f"{url}/health", running, log, "vLLM")
        yield url


@contextlib.contextmanager
def process(command: list[str], environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command in a process group of its own, which a Ctrl-C does not reach; the whole group ends with the block."""
    with log.open("ab") as output:
        running = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=_end_with_parent(),
        )
    try:
        yield running
    finally:
        # A second Ctrl-C must not leave it running.
        previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            _end(running)
        finally:
            signal.signal(signal.SIGINT, previous)


def await_health(url: str, running: subprocess.Popen[bytes], log: Path, name: str) -> None:
    """Return when `url` answers 200.

    Raises:
      UpstreamUnavailable: the process ended, or takes too long.
    """
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline and running.poll() is None:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(url, timeout=2.0, trust_env=False).status_code == 200:
                return
        time.sleep(0.5)
    tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-12:])
    raise UpstreamUnavailable(f"{name} did not start; the end of {log}:\n{tail}")


def _end(running: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(running.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        running.wait(_STOP_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(running.pid, signal.SIGKILL)
    running.wait()


def _end_with_parent() -> Callable[[], object] | None:
    """Where the kernel can: it ends the process if this one is killed, which runs no `finally`."""
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return lambda: library.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
