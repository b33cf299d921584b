"""Doctor's findings about a server, as the daemon's configuration asks for them."""

import socket

import pytest

from adaptd.app import doctor
from adaptd.app.doctor_vllm import vllm_checks
from adaptd.config import load


def test_a_scope_that_cannot_travel_and_a_server_that_is_down_are_both_said() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    settings = [f"upstream.url=http://127.0.0.1:{port}", "engine.kind=vllm"]
    found = {c.name: c for c in vllm_checks(load(None, settings))}
    assert (found["publishing"].state, bool(found["publishing"].remedy)) == ("warning", True)
    assert "adapt.gated: false" in found["publishing"].found
    asked_for = {c.name: c for c in vllm_checks(load(None, [*settings, "upstream.publish=true"]))}
    assert asked_for["publishing"].state == "failed"
    assert {c.name: c for c in vllm_checks(load(None, [*settings, "upstream.publish=false"]))}[
        "publishing"
    ].state == "ok"
    assert found["server"].state == "failed"
    assert found["address"].state == "ok"


def test_the_targets_weights_are_not_read_where_the_server_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """They may be of a size that this machine cannot hold."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the target's weights were read")

    monkeypatch.setattr("adaptd.models.load.load_causal_lm", refuse)
    found = {c.name: c for c in doctor._models(load(None, ["engine.kind=vllm"]))}
    assert found["models"].found.startswith("target in the server")
    assert found["vocabulary"].state == "ok"


def test_each_of_several_servers_is_checked_under_its_number() -> None:
    ports = []
    for _ in range(2):
        with socket.create_server(("127.0.0.1", 0)) as free:
            ports.append(free.getsockname()[1])
    urls = ", ".join(f'"http://127.0.0.1:{port}"' for port in ports)
    found = [c.name for c in vllm_checks(load(None, [f"upstream.urls=[{urls}]", "engine.kind=vllm"]))]
    assert {"server 1: address", "server 2: address"} <= set(found)
