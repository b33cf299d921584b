"""A headless Chromium, spoken to over its debugging pipe: no driver and no package beside the browser."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

#: Names that Chromium goes by.
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_ANSWER_S = 30.0


def find() -> str | None:
    """Where the browser is; ADAPTD_BROWSER names another one."""
    given = os.environ.get("ADAPTD_BROWSER")
    return given or next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One process. Messages are JSON with a NUL behind each, on the descriptors 3 (to it) and 4 (from it)."""

    def __init__(self, path: str, profile: Path) -> None:
        to_read, self._to = os.pipe()
        self._from, from_write = os.pipe()
        # The shell moves the ends to where Chromium expects them.
        script = f'exec 3<&{to_read} 4>&{from_write}; exec "$@"'
        flags = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--hide-scrollbars",
            "--no-first-run",
            "--disable-background-networking",
            "--force-device-scale-factor=1",
            f"--user-data-dir={profile}",
            "--remote-debugging-pipe",
        ]
        self.process = subprocess.Popen(
            ["/bin/bash", "-c", script, "bash", path, *flags],
            pass_fds=(to_read, from_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "TZ": "UTC", "LANG": "en_GB.UTF-8"},
        )
        os.close(to_read)
        os.close(from_write)
        self._number, self._buffer = 0, b""
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, params: Mapping[str, Any] | None = None, session: str | None = None) -> Any:
        """The result of one command.

        Raises:
          RuntimeError: the browser refused it. TimeoutError: it does not answer.
        """
        self._number += 1
        message = {"id": self._number, "method": method, "params": dict(params or {})}
        if session is not None:
            message["sessionId"] = session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            found = self._read(_ANSWER_S)
            if found.get("id") != self._number:
                self.events.append(found)
                continue
            if "error" in found:
                raise RuntimeError(f"{method}: {found['error']['message']}")
            return found["result"]

    def _read(self, seconds: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            if not select.select([self._from], [], [], seconds)[0]:
                raise TimeoutError(f"the browser said nothing for {seconds} s")
            piece = os.read(self._from, 1 << 20)
            if not piece:
                raise RuntimeError(f"the browser ended with status {self.process.wait()}")
            self._buffer += piece
        message, _, self._buffer = self._buffer.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found

    def close(self) -> None:
        """End it."""
        try:
            self.call("Browser.close")
            self.process.wait(timeout=10)
        except (RuntimeError, TimeoutError, OSError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()
        os.close(self._to)
        os.close(self._from)


class Page:
    """One tab with its console, its requests and its exceptions."""

    def __init__(self, browser: Browser, width: int = 1280, height: int = 900, *, dark: bool = False) -> None:
        self._browser = browser
        self._target = browser.call("Target.createTarget", {"url": "about:blank"})["targetId"]
        attached = browser.call("Target.attachToTarget", {"targetId": self._target, "flatten": True})
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log", "Accessibility"):
            self.call(f"{domain}.enable")
        self.size(width, height)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def call(self, method: str, **params: Any) -> Any:
        return self._browser.call(method, params, self._session)

    def size(self, width: int, height: int) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)

    def js(self, expression: str) -> Any:
        """The value of an expression on the page; promises are awaited."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"]["exception"].get("description", "a script failed"))
        return found["result"].get("value")

    def text(self, selector: str) -> str:
        found: str = self.js(f"document.querySelector({json.dumps(selector)})?.textContent ?? ''")
        return found

    def wait(self, expression: str, seconds: float = 20.0) -> Any:
        """What the expression is once it is true."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if found := self.js(f"(() => {{ try {{ return {expression}; }} catch {{ return null; }} }})()"):
                return found
            time.sleep(0.05)
        shown = self.js("document.body.innerText.slice(0, 1500)")
        raise AssertionError(f"never true: {expression}\ntroubles: {self.troubles()}\npage: {shown}")

    def press(self, key: str, code: int, modifiers: int = 0) -> None:
        about = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": modifiers}
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, **about)

    def screenshot(self, path: Path, *, whole: bool = True) -> None:
        if whole:
            size = self.call("Page.getLayoutMetrics")["cssContentSize"]
            clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
            found = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        else:
            found = self.call("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(found["data"]))

    def mine(self, method: str) -> list[dict[str, Any]]:
        """Events of this tab so far."""
        self.js("0")
        events = self._browser.events
        return [e["params"] for e in events if e.get("sessionId") == self._session and e.get("method") == method]

    def troubles(self) -> list[str]:
        """Exceptions, refusals by the policy, failed loads: everything that a console would show in red."""
        thrown = [
            str(e["exceptionDetails"].get("exception", {}).get("description"))
            for e in self.mine("Runtime.exceptionThrown")
        ]
        logged = [e["entry"]["text"] for e in self.mine("Log.entryAdded") if e["entry"]["level"] == "error"]
        return thrown + logged

    def requested(self) -> list[str]:
        return [e["request"]["url"] for e in self.mine("Network.requestWillBeSent")]

    def close(self) -> None:
        self._browser.call("Target.closeTarget", {"targetId": self._target})
