"""Models, health, metrics, status and administration."""

from __future__ import annotations

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
