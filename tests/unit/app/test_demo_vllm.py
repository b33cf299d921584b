"""The demonstration beside vLLM, without one: what is said where something is absent, and that nothing is left running."""

import contextlib
import importlib.metadata
import os
import sys
import time
from pathlib import Path

import pytest

from adaptd.app.demo_traffic import Leg, openai_client
from adaptd.app.demo_vllm import FULL, QUICK, Phase, _settings_file, questions, settings_for
from adaptd.app.publication import why_not
from adaptd.app.vllm_process import await_health, find_vllm, plugin_folder, process
from adaptd.config import load
from adaptd.errors import AdaptdError, UpstreamUnavailable
from adaptd.sidecar.metrics import SpecCounters


def test_a_vllm_that_is_not_there_is_named_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UpstreamUnavailable, match=rf"no vLLM at {tmp_path}.*--vllm.*make \.vllm"):
        find_vllm(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UpstreamUnavailable, match="no vLLM here"):
        find_vllm(None)


def test_it_is_found_by_environment_by_executable_and_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / ".vllm" / "bin" / "vllm"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    assert find_vllm(tmp_path / ".vllm") == find_vllm(program) == program
    monkeypatch.chdir(tmp_path)
    assert find_vllm(None) == program


def test_without_the_openai_client_the_remedy_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(AdaptdError, match=r"pip install 'adaptd\[demo\]'"):
        openai_client()


def test_the_servers_environment_finds_the_plugin_in_the_folder(tmp_path: Path) -> None:
    folder = plugin_folder(tmp_path / "site")
    (found,) = importlib.metadata.distributions(path=[str(folder)])
    (entry,) = found.entry_points
    assert (entry.group, entry.name) == ("vllm.general_plugins", "adaptd")
    assert entry.value == "adaptd.sidecar.vllm_plugin:register"
    assert (folder / "adaptd" / "sidecar" / "vllm_plugin.py").is_file()


def test_the_demonstrations_settings_can_be_published_and_are_overridden(tmp_path: Path) -> None:
    config = settings_for(None, [f"state_dir={tmp_path}", "learn.steps_per_tick=3"])
    assert why_not(config) == ""
    assert (config.learn.steps_per_tick, config.engine.kind, config.deployment) == (3, "vllm", "demo")
    written = load(_settings_file(config, "http://127.0.0.1:9", tmp_path))
    assert written.model_dump(exclude={"upstream"}) == config.model_dump(exclude={"upstream"})
    assert written.upstream.url == "http://127.0.0.1:9"


@pytest.mark.parametrize("phase", [*FULL, *QUICK])
def test_the_last_questions_were_never_asked_before(phase: Phase) -> None:
    for enough, count in ((False, phase.most), (True, phase.least)):
        asked = list(questions(phase, 0, lambda answer=enough: answer))  # type: ignore[misc]
        assert len(asked) == count
        assert not set(asked[-100:]) & set(asked[:-100])


def test_the_servers_counters_give_the_ends_of_a_leg() -> None:
    leg = Leg("math", answered=300)
    # 5 rounds a request; nothing is accepted at first, two of a round in the last hundred.
    leg.looks = [(n, SpecCounters(5.0 * n, 20.0 * n, 10.0 * max(0, n - 200))) for n in range(0, 301, 10)]
    assert leg.ends(100) == {"first_100_mal": 1.0, "last_100_mal": 3.0}
    assert Leg("none").ends(100) == {"first_100_mal": None, "last_100_mal": None}


def test_a_process_ends_with_its_block_and_all_that_it_started(tmp_path: Path) -> None:
    script = "import subprocess, sys, time; print(subprocess.Popen(['sleep', '600']).pid, flush=True); time.sleep(600)"
    log = tmp_path / "log"
    with (
        contextlib.suppress(KeyboardInterrupt),
        process([sys.executable, "-c", script], dict(os.environ), log) as running,
    ):
        while not log.read_text().strip():
            time.sleep(0.02)
        raise KeyboardInterrupt
    assert running.poll() is not None
    child = Path(f"/proc/{log.read_text().strip()}/stat")
    for _ in range(500):  # signalled, and gone as soon as it is scheduled
        if not child.exists() or child.read_text().split()[2] == "Z":
            return
        time.sleep(0.01)
    raise AssertionError("what the process had started is left running")


def test_a_process_that_ends_by_itself_is_said_with_its_last_words(tmp_path: Path) -> None:
    log = tmp_path / "log"
    script = "import sys; sys.exit('out of luck')"
    with (
        process([sys.executable, "-c", script], dict(os.environ), log) as running,
        pytest.raises(UpstreamUnavailable, match="out of luck"),
    ):
        await_health("http://127.0.0.1:9/health", running, log, "vLLM")
