"""The private server: it keeps its data, lives as long as its owner, and never shares a directory."""

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from buffers import embedded
from buffers.connection import connect
from buffers.embedded import start_embedded
from buffers.errors import TableUnavailable

pytestmark = pytest.mark.redis


def running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + 10
    while running(pid):
        assert time.monotonic() < deadline, f"redis {pid} outlived its owner"
        time.sleep(0.02)


def test_the_data_survive_a_clean_restart(tmp_path: Path) -> None:
    server = start_embedded(tmp_path)
    with connect(server.url) as client:
        client.set("kept", "yes")
    server.close()
    server.close()
    wait_until_gone(server.pid)
    again = start_embedded(tmp_path)
    with connect(again.url) as client:
        assert client.get("kept") == b"yes"
    again.close()


def test_only_its_owner_can_reach_it_and_only_by_its_socket(tmp_path: Path) -> None:
    server = start_embedded(tmp_path / "made" / "for it")
    path = Path(server.url.removeprefix("unix://"))
    with connect(server.url) as client:
        assert client.config_get("port") == {"port": "0"}
    assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0
    server.close()


def test_a_directory_with_a_long_name_still_gets_a_socket(tmp_path: Path) -> None:
    server = start_embedded(tmp_path / ("long" * 30))
    assert server.alive()
    socket = Path(server.url.removeprefix("unix://"))
    server.close()
    assert not socket.parent.exists(), "the temporary folder of the socket goes with the server"


def test_a_second_server_in_the_same_directory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = start_embedded(tmp_path)
    monkeypatch.setattr(embedded, "_START_TIMEOUT_S", 0.2)
    with pytest.raises(TableUnavailable, match="in use by another embedded Redis"):
        start_embedded(tmp_path)
    assert server.alive()
    server.close()


def test_a_server_that_cannot_start_shows_the_end_of_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "replay.rdb").write_bytes(b"REDIS0009 this is no snapshot")
    monkeypatch.setattr(embedded, "_START_TIMEOUT_S", 0.7)
    with pytest.raises(TableUnavailable, match=r"did not start; end of its log: .*(?s:.)*replay\.rdb is damaged"):
        start_embedded(tmp_path)


def test_a_killed_server_is_not_alive_and_the_directory_is_free_after_close(tmp_path: Path) -> None:
    server = start_embedded(tmp_path)
    os.kill(server.pid, signal.SIGKILL)
    wait_until_gone(server.pid)
    assert not server.alive()
    server.close()
    again = start_embedded(tmp_path)
    assert again.alive()
    again.close()


def test_the_server_ends_with_its_owner_even_if_that_is_killed(tmp_path: Path) -> None:
    """A daemon that died by kill -9 must not leave a Redis behind that nobody knows of."""
    code = (
        "import sys, time; from buffers.embedded import start_embedded; "
        "s = start_embedded(sys.argv[1]); print(s.pid, flush=True); time.sleep(60)"
    )
    root = Path(__file__).parents[3]
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(root)}
    ) as owner:
        assert owner.stdout is not None
        pid = int(owner.stdout.readline())
        assert running(pid)
        owner.kill()
    wait_until_gone(pid)
    again = start_embedded(tmp_path)
    assert again.alive()
    again.close()
