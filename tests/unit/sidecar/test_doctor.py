"""Doctor's findings about a server, as the daemon's configuration asks for them."""

import socket

from adaptd.app.doctor_vllm import vllm_checks
from adaptd.config import load


def test_a_scope_that_cannot_travel_and_a_server_that_is_down_are_both_said() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    found = {c.name: c for c in vllm_checks(load(None), f"http://127.0.0.1:{port}")}
    assert found["publishable scope"].state == "failed"
    assert "adapt.gated: false" in found["publishable scope"].found
    assert found["server"].state == "failed"
    assert found["address"].state == "ok"
