"""The dashboard of a daemon as people run it, in a real browser: live figures, history from Redis, and its end."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.browser.conftest import OpenPage
from tests.integration.test_daemon import Served

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.redis]


def test_a_real_daemon_is_followed_from_its_first_request_to_its_end(open_page: OpenPage, tmp_path: Path) -> None:
    daemon = Served(tmp_path)
    try:
        page = open_page(f"{daemon.url}/#1h")
        page.wait("document.body.dataset.link === 'stream'")
        page.wait("document.getElementById('state').textContent === 'serving'")
        for i in range(24):
            headers = {"x-adaptd-domain": "math" if i % 2 else "medical"}
            daemon.ask(f"What is {i} plus {i}?", temperature=0.0, extra_headers=headers)
        page.wait("domains.textContent.includes('math') && domains.textContent.includes('medical')")
        page.wait("trends.names.join() === 'all,math,medical'", 90)
        page.wait("document.querySelector('#domains tbody tr:last-child td').textContent === '24'")
        assert page.wait("trends.data.domains.all.requests.reduce((a, b) => a + b) === 24", 90)
        known = page.js("trends.data.domains.math.mal.filter(known)")
        assert known
        assert all(1 <= mal <= 5 for mal in known)
        page.wait("document.querySelectorAll('#learner dt').length >= 4 && learner.textContent.includes('ticks')", 90)
        page.wait("/\\d/.test(document.querySelector('#buffer td.number').textContent)")
        assert not page.troubles()
        page.screenshot(tmp_path / "daemon.png")
        began = time.monotonic()
        assert daemon.stop() == 0, "a viewer does not hold up the drain"
        assert time.monotonic() - began < 45
        page.wait("document.body.classList.contains('stale')")
    finally:
        if daemon.process.poll() is None:
            daemon.process.kill()
