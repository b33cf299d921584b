"""The page and its parts as they are served; what they do is tested in a browser (tests/browser)."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path
from typing import Any

import pytest

import adaptd.server

STATIC = Path(adaptd.server.__path__[0]) / "static"


def test_the_page_runs_its_own_scripts_by_their_hashes_and_nothing_else(call: Any) -> None:
    answer = call("GET", "/")
    page, policy = answer.text, answer.headers["content-security-policy"]
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in policy
    assert "connect-src 'self'" in policy
    assert not re.search(r"unsafe|http:|https:|\*", policy)
    assert "<style" not in page
    assert not re.search(r"<script(?![^>]* src=)|\son\w+=|\sstyle=", page), "nothing inline"
    parts = re.findall(r'(?:src|href)="/adaptd/static/([\w.]+)" integrity="([^"]+)"', page)
    assert {name for name, _ in parts} == {p.name for p in STATIC.iterdir() if p.suffix in (".js", ".css")}
    for name, given in parts:
        body = call("GET", f"/adaptd/static/{name}").content
        digest = f"sha256-{base64.b64encode(hashlib.sha256(body).digest()).decode()}"
        assert given == digest
        assert (f"'{digest}'" in policy) == name.endswith(".js")


def test_parts_are_typed_and_kept_by_browsers_until_they_change(call: Any) -> None:
    for name, media_type in (("live.js", "text/javascript"), ("dashboard.css", "text/css")):
        answer = call("GET", f"/adaptd/static/{name}")
        assert answer.headers["content-type"].startswith(media_type)
        assert answer.headers["x-content-type-options"] == "nosniff"
        kept = call("GET", f"/adaptd/static/{name}", headers={"if-none-match": answer.headers["etag"]})
        assert (kept.status_code, kept.content) == (304, b"")


@pytest.mark.parametrize("name", ["none.js", "..%2Fapp.py", "index.html", "VENDORED.md"])
def test_nothing_but_the_pages_parts_is_served(call: Any, name: str) -> None:
    assert call("GET", f"/adaptd/static/{name}").status_code == 404


def test_nothing_is_asked_of_other_machines_and_nothing_enters_as_markup() -> None:
    for path in STATIC.iterdir():
        if path.name.startswith("uplot") or path.name == "VENDORED.md":
            continue
        text = path.read_text(encoding="utf-8")
        assert set(re.findall(r"https?://[^\"'\s]+", text)) <= {"http://www.w3.org/2000/svg"}, path.name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text), (
            path.name
        )


def test_the_chart_library_is_the_one_that_is_named() -> None:
    said = (STATIC / "VENDORED.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(uplot[\w.]+)` \|.*`([0-9a-f]{64})` \|$", said, re.MULTILINE))
    assert set(rows) == {p.name for p in STATIC.glob("uplot*")}
    for name, digest in rows.items():
        assert hashlib.sha256((STATIC / name).read_bytes()).hexdigest() == digest
    assert "(v1.6.32)" in (STATIC / "uplot.js").read_text(encoding="utf-8")[:200]
    assert "MIT License" in (STATIC / "uplot.LICENSE").read_text(encoding="utf-8")
