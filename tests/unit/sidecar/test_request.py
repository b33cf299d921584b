"""What is added to a request, and what is left alone."""

import json
from typing import Any

import pytest

from adaptd.sidecar.request import Plan, plan

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "hello"}]


def planned(path: str = CHAT, **options: Any) -> Plan | None:
    how = {"top_logprobs": 5, "capture": None, "models": ("m",)}
    how |= {key: options.pop(key) for key in ("capture", "top_logprobs", "ask_usage") if key in options}
    text = {"messages": MESSAGES} if path == CHAT else {"prompt": "hello"}
    return plan(path, json.dumps({"model": "m", **text, **options}).encode(), **how)  # type: ignore[arg-type]


def sent(**options: Any) -> dict[str, Any]:
    found = planned(**options)
    assert found is not None
    loaded: dict[str, Any] = json.loads(found.body)
    return loaded


def test_a_chat_is_asked_for_tokens_and_their_likeliest_rivals() -> None:
    body = sent(temperature=0.5)
    assert (body["return_token_ids"], body["return_tokens_as_token_ids"]) == (True, True)
    assert (body["logprobs"], body["top_logprobs"]) == (True, 5)
    assert "stream_options" not in body


def test_a_completion_has_one_number_for_both() -> None:
    assert sent(path=TEXT)["logprobs"] == 5


def test_a_stream_is_asked_for_usage_where_acceptance_rides() -> None:
    assert sent(stream=True)["stream_options"] == {"include_usage": True}
    assert sent(stream=True, stream_options={"include_usage": False})["stream_options"] == {"include_usage": True}
    both = {"include_usage": False, "continuous_usage_stats": True}
    assert sent(stream=True, stream_options=both)["stream_options"] == {
        "include_usage": True,
        "continuous_usage_stats": False,
    }


@pytest.mark.parametrize(
    "options",
    [
        {"stream_options": {"include_usage": True}},
        {"n": 2},
        {"path": TEXT, "prompt": ["a", "b"]},
        {"ask_usage": False},
    ],
)
def test_usage_is_not_added_where_it_is_there_or_tells_nothing(options: dict[str, Any]) -> None:
    found = planned(stream=True, **options)
    assert found is not None
    assert not found.asked.usage


def test_what_the_client_asked_for_itself_is_not_ours_to_take_out() -> None:
    found = planned(return_token_ids=True)
    assert found is not None
    assert not found.asked.token_ids
    assert found.asked.logprobs


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"logprobs": True}, "client's logprobs"),
        ({"path": TEXT, "logprobs": 0}, "client's logprobs"),
        ({"capture": "opted out"}, "opted out"),
        ({"top_logprobs": 0}, "no log-probabilities"),
        ({"response_format": {"type": "json_object"}}, "constrained"),
        ({"tool_choice": "required"}, "constrained"),
        ({"structured_outputs": {"choice": ["a"]}}, "special"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "media"),
    ],
)
def test_some_are_counted_and_not_captured(options: dict[str, Any], why: str) -> None:
    found = planned(**options)
    assert found is not None
    assert found.why_not == why
    assert not found.asked.any
    assert json.loads(found.body).get("return_token_ids") is None


@pytest.mark.parametrize(
    "options",
    [
        {"echo": True},
        {"use_beam_search": True},
        {"stream": "true"},
        {"n": "2"},
        {"n": True},
        {"n": 0},
        {"model": "an-adapter"},
        {"model": 3},
        {"messages": []},
        {"messages": "hello"},
        {"stream_options": {"include_usage": True}},  # without stream: the server's error, and its words
        {"stream": True, "stream_options": {"include_usage": "yes"}},
        {"stream": True, "stream_options": []},
        {"temperature": "hot"},
    ],
)
def test_what_is_unusual_is_left_alone(options: dict[str, Any]) -> None:
    assert planned(**options) is None


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff\xfe", b"null", '{"prompt":"é"}'.encode("utf-16")])
def test_a_body_that_is_no_object_is_left_alone(body: bytes) -> None:
    assert plan(TEXT, body, top_logprobs=5, capture=None) is None


def test_other_routes_are_left_alone() -> None:
    assert plan("/v1/embeddings", b'{"input":"a"}', top_logprobs=5, capture=None) is None


def test_the_clients_own_bytes_stay() -> None:
    body = b'{"model":"m", "prompt":"caf\\u00e9 \xc3\xa9", "temperature":1.50}'
    found = plan(TEXT, body, top_logprobs=2, capture=None)
    assert found is not None
    assert found.body.startswith(body[:-1])
    assert found.sampling == {"temperature": 1.5}
