"""A real Chromium and a real server with a service of realistic figures."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from tests import samples
from tests.browser import devtools

OpenPage = Callable[..., devtools.Page]


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[devtools.Browser]:
    path = devtools.find()
    if path is None:
        pytest.skip(
            f"no browser: install chromium, or name one in ADAPTD_BROWSER (looked for {', '.join(devtools.NAMES)})"
        )
    profile = tmp_path_factory.mktemp("profile")
    started = devtools.Browser(path, profile)
    yield started
    started.close()
    shutil.rmtree(profile, ignore_errors=True)


@pytest.fixture
def open_page(browser: devtools.Browser) -> Iterator[OpenPage]:
    pages: list[devtools.Page] = []

    def opened(url: str, width: int = 1280, height: int = 900, *, dark: bool = False) -> devtools.Page:
        page = devtools.Page(browser, width, height, dark=dark)
        pages.append(page)
        page.open(url)
        return page

    yield opened
    for page in pages:
        page.close()


class Served:
    """A server process whose figures the test changes by POST /fake/..."""

    def __init__(self, home: Path) -> None:
        figures = home / "figures.json"
        figures.write_text(json.dumps(samples.figures(home)))
        command = [sys.executable, str(Path(__file__).with_name("serve_samples.py")), str(figures)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()
        assert self.url.startswith("http"), "the server did not start"

    def tell(self, **changes: object) -> None:
        httpx.post(f"{self.url}/fake", json=changes, trust_env=False).raise_for_status()

    def stop(self, *, seconds: float = 15.0) -> float:
        """Ask it to end, as a daemon is asked; how long it took."""
        began = time.monotonic()
        self.process.terminate()
        assert self.process.wait(timeout=seconds) == 0
        return time.monotonic() - began


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    started = Served(tmp_path_factory.mktemp("samples"))
    yield started
    if started.process.poll() is None:
        started.process.kill()
        started.process.wait()


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Served]:
    """One that the test may stop."""
    started = Served(tmp_path)
    yield started
    if started.process.poll() is None:
        started.process.kill()
        started.process.wait()
