"""The completion routes: what reaches the service, what comes back, and every refusal by name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from adaptd.errors import DecoderStopped

HELLO = {"model": "adaptd", "prompt": "how to treat a burn"}
CHAT = {"model": "adaptd", "messages": [{"role": "user", "content": "how to treat a burn"}]}
TEXT = "Keep the wound clean and dry; éñ 漢 done."


NOTHING_CACHED = {"prompt_tokens_details": {"cached_tokens": 0}}


def events(text: str) -> list[Any]:
    """The data of server-sent events, `[DONE]` as it is."""
    assert text.endswith("\n\n")
    lines = [block.removeprefix("data: ") for block in text.removesuffix("\n\n").split("\n\n")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def test_a_completion_has_openais_fields_and_adaptds_statistics(call: Any, service: Any) -> None:
    answer = call("POST", "/v1/completions", json={**HELLO, "max_tokens": 40}).json()
    assert answer["object"] == "text_completion"
    assert answer["id"].startswith("cmpl-")
    assert answer["model"] == "adaptd"
    assert answer["choices"] == [{"index": 0, "text": TEXT, "logprobs": None, "finish_reason": "stop"}]
    assert answer["usage"] == {"prompt_tokens": 5, "completion_tokens": 10, "total_tokens": 15, **NOTHING_CACHED}
    expected = {"rounds": 2, "proposed": 8, "accepted": 8, "mean_acceptance_length": 5.0, "draft_version": 3}
    assert answer["adaptd"] == expected
    assert (service.completed, service.aborted) == (1, 0)


def test_a_chat_completion_has_openais_fields(call: Any) -> None:
    answer = call("POST", "/v1/chat/completions", json=CHAT).json()
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    message = {"role": "assistant", "content": TEXT}
    assert answer["choices"] == [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}]


def test_every_setting_reaches_the_service(call: Any, service: Any) -> None:
    settings = {"max_tokens": 3, "temperature": 0, "top_p": 0.5, "top_k": 20, "seed": 7, "stop": ["\n", "END"]}
    headers = {
        "x-adaptd-domain": "medical",
        "x-adaptd-tenant": "clinic-1",
        "x-adaptd-no-store": "1",
        "x-request-id": "abc",
    }
    call("POST", "/v1/completions", json={**HELLO, **settings, "ignore_eos": True, "stream": True}, headers=headers)
    seen = service.seen[0]
    assert (seen.max_tokens, seen.temperature, seen.top_p, seen.top_k, seen.seed) == (3, 0.0, 0.5, 20, 7)
    assert (seen.stop, seen.ignore_eos, seen.domain, seen.tenant) == (("\n", "END"), True, "medical", "clinic-1")
    assert (seen.store, seen.stream, seen.client_request_id, seen.model) == (False, True, "abc", "adaptd")
    assert seen.prompt_ids == tuple(service.encode(HELLO["prompt"]))


def test_defaults_are_openais(call: Any, service: Any) -> None:
    call("POST", "/v1/completions", json={"prompt": "one two"})
    call("POST", "/v1/chat/completions", json=CHAT)
    text, chat = service.seen
    assert (text.max_tokens, text.temperature, text.top_p, text.top_k, text.seed, text.stop) == (
        16,
        1.0,
        1.0,
        0,
        None,
        (),
    )
    assert (text.domain, text.tenant, text.store, text.stream, text.ignore_eos) == (None, None, True, False, False)
    assert text.model == "adaptd"
    assert chat.max_tokens == 64 - len(chat.prompt_ids)


def test_the_default_length_gives_way_to_a_context_that_is_nearly_full(call: Any, service: Any) -> None:
    assert call("POST", "/v1/completions", json={"prompt": [5] * 60}).status_code == 200
    assert service.seen[0].max_tokens == 4


def test_max_completion_tokens_is_the_newer_name_and_wins(call: Any, service: Any) -> None:
    call("POST", "/v1/chat/completions", json={**CHAT, "max_tokens": 9, "max_completion_tokens": 4})
    call("POST", "/v1/chat/completions", json={**CHAT, "max_tokens": 9})
    assert [seen.max_tokens for seen in service.seen] == [4, 9]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a b", 1),
        (["a b", "c"], 2),
        ([4, 5, 6], 1),
        ([[4, 5], [6]], 2),
    ],
)
def test_a_prompt_is_text_texts_ids_or_lists_of_ids(call: Any, service: Any, prompt: Any, expected: int) -> None:
    answer = call("POST", "/v1/completions", json={"prompt": prompt}).json()
    assert [choice["index"] for choice in answer["choices"]] == list(range(expected))
    assert answer["usage"]["prompt_tokens"] == sum(len(seen.prompt_ids) for seen in service.seen)
    if prompt == [4, 5, 6]:
        assert service.seen[0].prompt_ids == (4, 5, 6)


def test_n_choices_have_seeds_of_their_own_and_the_prompt_counts_once(call: Any, service: Any) -> None:
    answer = call("POST", "/v1/completions", json={"prompt": ["a b", "c d e"], "n": 3, "seed": 10}).json()
    assert [seen.seed for seen in service.seen] == [10, 11, 12, 10, 11, 12]
    assert [len(seen.prompt_ids) for seen in service.seen] == [2, 2, 2, 3, 3, 3]
    assert len({seen.request_id for seen in service.seen}) == 6
    assert answer["usage"] == {"prompt_tokens": 5, "completion_tokens": 60, "total_tokens": 65, **NOTHING_CACHED}
    assert answer["adaptd"]["rounds"] == 12


def test_a_conversation_is_rendered_with_its_parts_joined_and_its_tools(call: Any, service: Any) -> None:
    tool = {"type": "function", "function": {"name": "look_up"}}
    asked = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]},
        asked,
        {"role": "tool", "content": "42", "tool_call_id": "1"},
    ]
    for choice in ("auto", "none"):
        call("POST", "/v1/chat/completions", json={"messages": messages, "tools": [tool], "tool_choice": choice})
    (rendered, offered), (_, withheld) = service.chats
    assert rendered == [{"role": "user", "content": "a b"}, asked, messages[2]]
    assert offered == [tool]
    assert withheld is None


def test_a_stream_has_the_same_text_as_a_whole_answer_and_ends_with_done(call: Any) -> None:
    answer = call("POST", "/v1/chat/completions", json={**CHAT, "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["x-accel-buffering"] == "no"
    *chunks, done = events(answer.text)
    assert done == "[DONE]"
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == TEXT
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 10 + ["stop"]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert chunks[-1]["adaptd"]["mean_acceptance_length"] == 5.0
    assert all("usage" not in chunk for chunk in chunks)


def test_a_stream_of_several_choices_ends_with_their_usage_if_asked(call: Any) -> None:
    body = {**HELLO, "n": 2, "stream": True, "stream_options": {"include_usage": True}}
    *chunks, usage, done = events(call("POST", "/v1/completions", json=body).text)
    assert done == "[DONE]"
    assert all(chunk["usage"] is None for chunk in chunks)
    for index in (0, 1):
        mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert "".join(choice["text"] for choice in mine) == TEXT
        assert mine[-1]["finish_reason"] == "stop"
    assert usage["choices"] == []
    assert usage["usage"] == {"prompt_tokens": 5, "completion_tokens": 20, "total_tokens": 25, **NOTHING_CACHED}
    assert usage["adaptd"]["rounds"] == 4


REFUSED: dict[str, tuple[str, dict[str, Any], int, str | None, list[str]]] = {
    "another model": ("text", {"model": "gpt-4"}, 404, None, ["gpt-4", "adaptd"]),
    "an empty prompt": ("text", {"prompt": ""}, 400, "prompt", ["empty"]),
    "no prompt": ("text", {"prompt": []}, 400, "prompt", ["empty"]),
    "an empty prompt among others": ("text", {"prompt": ["a", ""]}, 400, "prompt", ["prompt[1]", "empty"]),
    "a prompt of spaces": ("text", {"prompt": "   "}, 400, "prompt", ["no tokens"]),
    "no messages": ("chat", {"messages": []}, 400, "messages", ["empty"]),
    "messages without content": ("chat", {"messages": [{"role": "user", "content": ""}]}, 400, "messages", ["empty"]),
    "null content": ("chat", {"messages": [{"role": "user"}]}, 400, "messages", ["messages[0].content"]),
    "a prompt that fills the context": ("text", {"prompt": [1] * 64}, 400, None, ["64 tokens", "holds 64"]),
    "a prompt beyond the context": ("text", {"prompt": [1] * 99}, 400, None, ["99 tokens", "holds 64"]),
    "an answer beyond the context": (
        "text",
        {"max_tokens": 60},
        400,
        None,
        ["5 tokens", "60", "65", "64", "at most 59"],
    ),
    "an id outside the vocabulary": ("text", {"prompt": [5, 1000]}, 400, "prompt", ["1000", "0 to 999"]),
    "a negative id": ("text", {"prompt": [5, -1]}, 400, "prompt", ["-1"]),
    "mixed prompts": ("text", {"prompt": ["a", 1]}, 400, "prompt", ["list of"]),
    "too many answers": ("text", {"prompt": ["a"] * 9, "n": 8}, 400, "prompt", ["9", "8", "64"]),
    "too many prompts": ("text", {"prompt": ["a"] * 65}, 400, "prompt", ["64"]),
    "n above 8": ("text", {"n": 9}, 400, "n", ["(9)", "less than or equal to 8"]),
    "n of 0": ("chat", {"n": 0}, 400, "n", ["(0)"]),
    "a temperature above 2": ("chat", {"temperature": 3.5}, 400, "temperature", ["(3.5)", "2"]),
    "a negative temperature": ("text", {"temperature": -0.1}, 400, "temperature", ["-0.1"]),
    "top_p of 0": ("text", {"top_p": 0}, 400, "top_p", ["(0)", "greater than 0"]),
    "top_k below -1": ("text", {"top_k": -2}, 400, "top_k", ["(-2)"]),
    "no tokens": ("text", {"max_tokens": 0}, 400, "max_tokens", ["(0)"]),
    "text for a number": ("text", {"seed": "lucky"}, 400, "seed", ["lucky"]),
    "an empty stop": ("text", {"stop": ""}, 400, "stop", ["1 to 256"]),
    "too many stops": ("text", {"stop": ["x"] * 17}, 400, "stop", ["at most 16"]),
    "log-probabilities": ("chat", {"logprobs": True}, 400, "logprobs", ["True", "not returned"]),
    "JSON mode": ("chat", {"response_format": {"type": "json_object"}}, 400, "response_format", ["text"]),
    "a penalty": ("text", {"presence_penalty": 0.5}, 400, "presence_penalty", ["0.5", "must be 0"]),
    "an echo": ("text", {"echo": True}, 400, "echo", ["must be false"]),
    "best_of": ("text", {"best_of": 4}, 400, "best_of", ["(4)", "(1)"]),
    "a forced tool": ("chat", {"tool_choice": "required"}, 400, "tool_choice", ["required", "auto"]),
    "a named tool": ("chat", {"tool_choice": {"type": "function"}}, 400, "tool_choice", ["named"]),
    "an image": (
        "chat",
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        400,
        "messages",
        ["image_url", "only text"],
    ),
    "stream_options without stream": ("text", {"stream_options": {}}, 400, "stream_options", ["stream is true"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_served_is_refused_with_value_and_rule(call: Any, service: Any, case: str) -> None:
    route, change, status, param, words = REFUSED[case]
    path, body = ("/v1/completions", HELLO) if route == "text" else ("/v1/chat/completions", CHAT)
    answer = call("POST", path, json={**body, **change})
    error = answer.json()["error"]
    assert answer.status_code == status
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    for word in words:
        assert word in error["message"]
    assert service.seen == []


def test_codes_of_openai_are_given_where_openai_has_one(call: Any) -> None:
    unknown = call("POST", "/v1/completions", json={**HELLO, "model": "x"}).json()["error"]
    long = call("POST", "/v1/completions", json={"prompt": [1] * 99}).json()["error"]
    assert (unknown["code"], long["code"]) == ("model_not_found", "context_length_exceeded")


def test_fields_of_openai_that_adaptd_does_not_know_are_ignored(call: Any) -> None:
    extra = {"user": "u", "metadata": {"a": 1}, "service_tier": "auto", "store": True, "parallel_tool_calls": False}
    quiet = {
        "logprobs": False,
        "response_format": {"type": "text"},
        "presence_penalty": 0.0,
        "logit_bias": {},
        "n": None,
    }
    assert call("POST", "/v1/chat/completions", json={**CHAT, **extra, **quiet}).status_code == 200


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"prompt": ', "not valid JSON"),
        (b"", "JSON object"),
        (b"[1, 2]", "JSON object"),
        (b'"text"', "JSON object"),
        (b'{"prompt": "a", "temperature": NaN}', "temperature"),
        (b"\xff\xfe", "body"),
    ],
)
def test_a_body_that_is_no_json_object_is_refused(call: Any, content: bytes, words: str) -> None:
    answer = call("POST", "/v1/completions", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]


def test_a_form_instead_of_json_is_refused_with_the_remedy(call: Any) -> None:
    answer = call("POST", "/v1/completions", content='{"prompt": "a"}', headers={"content-type": "text/plain"})
    assert answer.status_code == 400
    assert "content-type: application/json" in answer.json()["error"]["message"]


def test_no_error_repeats_the_text_of_a_prompt(call: Any) -> None:
    secret = "my-diagnosis"
    attempts = [
        ("/v1/completions", {"prompt": {"a": secret}}),
        ("/v1/completions", {"prompt": [secret, 1]}),
        ("/v1/completions", {"prompt": f"{secret} " * 99}),
        ("/v1/completions", {"prompt": "a", "stop": [secret * 99]}),
        ("/v1/completions", {"prompt": "a", "suffix": secret}),
        ("/v1/completions", {"prompt": "a", "structured_outputs": {"regex": secret}}),
        ("/v1/chat/completions", {"messages": secret}),
        ("/v1/chat/completions", {"messages": [{"role": secret * 9, "content": 3}]}),
        ("/v1/chat/completions", {"messages": [{"content": secret}]}),
    ]
    for path, body in attempts:
        answer = call("POST", path, json=body)
        assert answer.status_code == 400, body
        assert secret not in answer.text
    broken = call(
        "POST", "/v1/completions", content=f'{{"prompt": "{secret}', headers={"content-type": "application/json"}
    )
    assert broken.status_code == 400
    assert secret not in broken.text


@pytest.mark.parametrize("name", ["x-adaptd-domain", "x-adaptd-tenant"])
@pytest.mark.parametrize("value", ["", "a b", "x" * 65, "a:b", "*"])
def test_a_domain_or_tenant_that_could_not_be_a_key_is_refused(call: Any, name: str, value: str) -> None:
    answer = call("POST", "/v1/completions", json=HELLO, headers={name: value})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == name


@pytest.mark.parametrize(
    ("value", "status", "store"), [("1", 200, False), ("TRUE", 200, False), ("0", 200, True), ("yes", 400, None)]
)
def test_no_store_is_honoured_or_refused_but_never_guessed(
    call: Any, service: Any, value: str, status: int, store: bool | None
) -> None:
    answer = call("POST", "/v1/completions", json=HELLO, headers={"x-adaptd-no-store": value})
    assert answer.status_code == status
    assert [seen.store for seen in service.seen] == ([] if store is None else [store])


@pytest.mark.parametrize("stream", [False, True])
def test_a_daemon_that_drains_refuses_with_503_and_when_to_retry(call: Any, service: Any, stream: bool) -> None:
    service.is_ready = (False, "draining")
    answer = call("POST", "/v1/chat/completions", json={**CHAT, "stream": stream})
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) >= 1
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("overloaded_error", "overloaded")
    assert "draining" in error["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_by_the_decoder_before_the_first_token_is_an_http_error(
    call: Any, service: Any, overloaded: Any, stream: bool
) -> None:
    service.refuse_first = overloaded
    answer = call("POST", "/v1/completions", json={**HELLO, "n": 4, "stream": stream})
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "1"
    assert "256" in answer.json()["error"]["message"]


def test_a_decoder_that_dies_half_way_fails_the_whole_answer(call: Any, service: Any) -> None:
    service.fail_after = (3, DecoderStopped("decoder 0 died; retry"))
    answer = call("POST", "/v1/completions", json={**HELLO, "n": 3})
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "decoder_stopped"
    assert service.started == service.aborted


def test_a_decoder_that_dies_half_way_ends_a_stream_with_an_error_event(call: Any, service: Any) -> None:
    service.fail_after = (3, DecoderStopped("decoder 0 died; retry"))
    answer = call("POST", "/v1/completions", json={**HELLO, "stream": True})
    assert answer.status_code == 200
    *chunks, error, done = events(answer.text)
    assert done == "[DONE]"
    assert len(chunks) == 3
    assert error["error"]["code"] == "decoder_stopped"


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_ends_without_a_reason_is_an_error_and_never_a_short_answer(
    call: Any, service: Any, stream: bool
) -> None:
    service.finish = False
    answer = call("POST", "/v1/completions", json={**HELLO, "stream": stream})
    error = events(answer.text)[-2]["error"] if stream else answer.json()["error"]
    assert error["code"] == "decoder_stopped"


@pytest.mark.parametrize("stream", [False, True])
def test_a_bug_is_a_500_that_tells_the_request_id_and_nothing_else(call: Any, service: Any, stream: bool) -> None:
    service.refuse_first = ZeroDivisionError("secret detail")
    answer = call("POST", "/v1/completions", json={**HELLO, "stream": stream}, headers={"x-request-id": "find-me"})
    assert answer.status_code == 500
    assert answer.headers["x-request-id"] == "find-me"
    assert answer.json()["error"]["type"] == "server_error"
    assert "find-me" in answer.text
    assert "secret" not in answer.text


def test_a_bug_in_the_middle_of_a_stream_is_an_error_event_without_details(call: Any, service: Any) -> None:
    service.fail_after = (2, ZeroDivisionError("secret detail"))
    answer = call("POST", "/v1/completions", json={**HELLO, "stream": True})
    error, done = events(answer.text)[-2:]
    assert done == "[DONE]"
    assert error["error"]["type"] == "server_error"
    assert "secret" not in answer.text


def test_a_request_id_is_echoed_and_one_is_made_where_it_is_absent_or_unfit(call: Any) -> None:
    assert (
        call("POST", "/v1/completions", json=HELLO, headers={"x-request-id": "mine-1"}).headers["x-request-id"]
        == "mine-1"
    )
    refused = call("POST", "/v1/completions", json={}, headers={"x-request-id": "mine-2"})
    assert (refused.status_code, refused.headers["x-request-id"]) == (400, "mine-2")
    for unfit in ("", "a b", "x" * 129):
        made = call("GET", "/livez", headers={"x-request-id": unfit}).headers["x-request-id"]
        assert made.startswith("req-")
        assert len(made) == 36


def test_a_body_over_the_limit_is_refused_announced_or_not(call: Any) -> None:
    def chunked() -> Any:
        async def parts() -> Any:
            for _ in range(20):
                yield b" " * 10_000

        return parts()

    headers = {"content-type": "application/json"}
    for content in (b" " * 100_001, chunked()):
        answer = call("POST", "/v1/completions", content=content, headers=headers)
        assert answer.status_code == 413
        assert "100000 bytes" in answer.json()["error"]["message"]
