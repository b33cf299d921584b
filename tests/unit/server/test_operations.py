"""Models, health, metrics, status, administration and the dashboard."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from adaptd.server.app import create_app

TOKEN = {"authorization": "Bearer correct-horse"}
PROMOTE = "/adaptd/checkpoints/promote"


def test_models_are_listed_and_found_by_name_with_slashes(call: Any) -> None:
    listed = call("GET", "/v1/models").json()
    assert [model["id"] for model in listed["data"]] == ["adaptd", "pocket/target"]
    assert listed["data"][0]["max_model_len"] == 64
    assert call("GET", "/v1/models/pocket/target").json()["id"] == "pocket/target"
    missing = call("GET", "/v1/models/gpt-4")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")


def test_a_daemon_that_loads_or_drains_is_live_but_not_ready(call: Any, service: Any) -> None:
    for path in ("/livez", "/readyz", "/healthz"):
        assert call("GET", path).status_code == 200
    service.is_ready = (False, "draining")
    assert call("GET", "/livez").status_code == 200
    for path in ("/readyz", "/healthz"):
        answer = call("GET", path)
        assert (answer.status_code, answer.json()["state"]) == (503, "draining")
        assert "retry-after" in answer.headers


def test_metrics_are_prometheus_text(call: Any) -> None:
    answer = call("GET", "/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert "adaptd_requests_total 7" in answer.text


def test_status_passes_its_bound_on_and_is_never_cached(call: Any, service: Any) -> None:
    answer = call("GET", "/adaptd/status?since=1h")
    assert answer.json()["draft"]["version"] == 3
    assert answer.headers["cache-control"] == "no-store"
    call("GET", "/adaptd/status")
    assert service.asked_since == ["1h", None]
    refused = call("GET", "/adaptd/status?since=yesterday")
    assert (refused.status_code, "such as 1h" in refused.text) == (400, True)
    assert call("GET", f"/adaptd/status?since={'x' * 33}").json()["error"]["param"] == "since"


def test_unknown_paths_and_methods_are_openai_errors_as_well(call: Any) -> None:
    for method, path, status in [
        ("GET", "/v1/embeddings", 404),
        ("GET", "/v1/completions", 405),
        ("GET", "/docs", 404),
    ]:
        answer = call(method, path)
        assert answer.status_code == status
        assert path in answer.json()["error"]["message"]


def test_an_administrator_lists_promotes_and_rolls_back(call: Any, service: Any) -> None:
    assert [v["version"] for v in call("GET", "/adaptd/checkpoints", headers=TOKEN).json()["versions"]] == [1, 2]
    assert call("POST", PROMOTE, headers=TOKEN, json={"version": 1}).json() == {"version": 3, "restored": 1}
    assert call("POST", "/adaptd/checkpoints/rollback", headers=TOKEN, json={}).json()["version"] == 4
    assert call("POST", "/adaptd/checkpoints/rollback", headers=TOKEN).json()["version"] == 5
    assert len(service.versions) == 5


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"authorization": "Basic correct-horse"}, 401),
        ({"authorization": "Bearer "}, 401),
        ({"authorization": "Bearer wrong"}, 403),
        ({"authorization": "Bearer correct-hors"}, 403),
        ({"authorization": b"Bearer \xe9\xff"}, 403),
    ],
)
def test_nobody_else_may_promote_or_roll_back_or_look(call: Any, service: Any, headers: Any, status: int) -> None:
    attempts = [
        ("POST", PROMOTE, {"version": 1}),
        ("POST", "/adaptd/checkpoints/rollback", {}),
        ("GET", "/adaptd/checkpoints", None),
    ]
    for method, path, body in attempts:
        answer = call(method, path, headers=headers, json=body)
        assert answer.status_code == status
        assert ("www-authenticate" in answer.headers) == (status == 401)
        assert "horse" not in answer.text
    assert len(service.versions) == 2


def test_the_right_token_from_another_machine_is_refused(call: Any, service: Any) -> None:
    for host, status in [
        ("10.0.0.7", 403),
        ("::1", 200),
        ("::ffff:127.0.0.1", 200),
        ("::ffff:10.0.0.7", 403),
        ("host", 403),
    ]:
        answer = call("POST", PROMOTE, client=(host, 1), headers=TOKEN, json={"version": 1})
        assert answer.status_code == status, host
    assert len(service.versions) == 4


def test_another_machine_is_let_in_where_told(app: Any, call: Any, service: Any) -> None:
    app.router.routes[:] = create_app(service, admin_token="correct-horse", admin_remote=True).router.routes
    assert call("POST", PROMOTE, client=("10.0.0.7", 1), headers=TOKEN, json={"version": 1}).status_code == 200


def test_a_report_names_tokens_and_is_for_this_machine_or_an_administrator(app: Any, call: Any, service: Any) -> None:
    found = call("GET", "/adaptd/report?since=2w&baseline=day0&traces=10")
    assert found.json() == {"since": "2w", "baseline": "day0", "traces": 10}
    assert found.headers["cache-control"] == "no-store"
    assert call("GET", "/adaptd/report").json()["since"] == "7d"
    for query in ("baseline=gold", "traces=0", "traces=many"):
        assert call("GET", f"/adaptd/report?{query}").status_code == 400
    assert call("GET", "/adaptd/report", client=("10.0.0.7", 1), headers=TOKEN).status_code == 403
    app.router.routes[:] = create_app(service, admin_token="correct-horse", admin_remote=True).router.routes
    assert call("GET", "/adaptd/report", client=("10.0.0.7", 1), headers=TOKEN).status_code == 200
    assert call("GET", "/adaptd/report", client=("10.0.0.7", 1)).status_code == 401


@pytest.mark.parametrize("token", [None, ""])
def test_without_a_configured_token_administration_is_off(app: Any, call: Any, service: Any, token: str | None) -> None:
    app.router.routes[:] = create_app(service, admin_token=token).router.routes
    for headers in ({}, {"authorization": "Bearer "}, {"authorization": "Bearer None"}):
        answer = call("POST", PROMOTE, headers=headers, json={"version": 1})
        assert answer.status_code == 403
        assert "set server.admin_token" in answer.json()["error"]["message"]


def test_a_version_that_is_not_there_is_404_and_one_that_is_no_number_400(call: Any) -> None:
    missing = call("POST", PROMOTE, headers=TOKEN, json={"version": 99})
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "checkpoint_not_found")
    for version in (0, "x", None):
        answer = call("POST", PROMOTE, headers=TOKEN, json={"version": version})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "version")


def test_the_dashboard_needs_nothing_from_elsewhere_and_may_run_nothing_else(call: Any) -> None:
    answer = call("GET", "/")
    page, policy = answer.text, answer.headers["content-security-policy"]
    assert answer.headers["content-type"].startswith("text/html")
    assert set(re.findall(r"https?://[^\"'\s]+", page)) == {"http://www.w3.org/2000/svg"}
    assert "/adaptd/status" in page
    assert "prefers-color-scheme: dark" in page
    assert "innerHTML" not in page
    for tag in ("script", "style"):
        (body,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


STATUS = {
    "deployment": "default",
    "adaptd_version": "0.1.0",
    "engine": "native",
    "k": 4,
    "uptime_s": 4000.0,
    "in_flight": 2,
    "draining": False,
    "draft": {"version": 7, "age_s": 90.0, "scope": "private_expert"},
    "acceptance": {
        "now": {"mal": 1.87, "token_acceptance": 0.217},
        "1h": {"mal": 1.5, "token_acceptance": 0.1},
        "24h": {"mal": None, "token_acceptance": None},
        "domains": {
            "<b>math</b>": {
                "now": {"mal": 1.36, "token_acceptance": 0.09},
                "1h": {"mal": 1.4, "token_acceptance": 0.1},
                "24h": {"mal": 1.4, "token_acceptance": 0.1, "requests": 1234},
                "sparkline": [1.2, 1.5, 2.0],
            },
        },
        "drift": {"state": {}, "events": [{"domain": "<b>math</b>", "direction": "down", "at": 1_700_000_000}]},
    },
    "buffer": {"available": True, "sizes": {"recent": 500}, "bytes": {"recent": 5_000_000}, "stored_bytes": 5_000_000},
    "decoders": [
        {"draft_version": 7, "swap": {"swaps": 3, "refusals": 1, "max_pause_s": 0.004}, "writer": {"dropped": 2}}
    ],
    "learner": {"steps": 640, "last_loss": 0.5, "promoted": 3, "rejected": 2},
    "events": [
        {"at": 1_700_000_000, "kind": "promoted", "version": 7, "gain": {"mean": 0.1, "low": 0.05, "high": 0.2}}
    ],
}


@pytest.mark.skipif(shutil.which("node") is None, reason="node runs the page's script; it is not needed to use adaptd")
def test_the_dashboards_script_shows_a_status_and_says_when_there_is_none(call: Any, tmp_path: Path) -> None:
    (script,) = re.findall(r"<script>(.*?)</script>", call("GET", "/").text, re.DOTALL)
    (tmp_path / "page.js").write_text(script, encoding="utf-8")
    dom = Path(__file__).with_name("dashboard_dom.js")

    def shown(status: Any) -> dict[str, Any]:
        command = ["node", str(dom), str(tmp_path / "page.js"), json.dumps(status)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        assert result.returncode == 0, result.stderr
        found: dict[str, Any] = json.loads(result.stdout)
        return found

    page = shown(STATUS)
    assert page["polled"] == "/adaptd/status"
    assert page["again_ms"] == 2000
    assert page["state"] == "serving"
    for words in ("draft version", "7", "1.87", "21.7 %", "640", "3", "1 refused; longest pause 4.0 ms"):
        assert words in page["tiles"]
    assert "<b>math</b>" in page["domains"], "a name is shown as text"
    assert "1.36" in page["domains"]
    assert "down" in page["domains"]
    assert page["curves"] == ["4.0,24.8 90.0,17.0 176.0,4.0"]
    assert "500 traces" in page["buffer"]
    assert "gain 0.100 [0.050, 0.200]" in page["events"]
    down = shown({**STATUS, "buffer": {"available": False, "error": "refused"}, "learner": None, "draining": True})
    assert "unavailable: refused" in down["buffer_note"]
    assert "learn.enabled is false" in down["tiles"]
    assert down["state"] == "draining"
    assert shown({})["state"] == "serving", "a young daemon has little to tell"
    gone = shown(None)
    assert gone["state"].startswith("no status")
    assert gone["again_ms"] == 2000
