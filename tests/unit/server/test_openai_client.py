"""The real `openai` client against a real server on a loopback port."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import openai
import pytest

from adaptd.errors import DecoderStopped

TEXT = "Keep the wound clean and dry; éñ 漢 done."
MESSAGES: Any = [{"role": "user", "content": "how to treat a burn"}]


def test_a_chat_answer_arrives_whole(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="adaptd", messages=MESSAGES, n=2, temperature=0, max_completion_tokens=20
    )
    assert [choice.message.content for choice in answer.choices] == [TEXT, TEXT]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (6, 20)
    assert answer.model_extra is not None
    assert answer.model_extra["adaptd"]["draft_version"] == 3


def test_a_chat_answer_arrives_in_pieces_with_its_usage(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="adaptd", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == TEXT
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.total_tokens == 16


def test_the_helper_that_accumulates_a_stream_accepts_it(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model="adaptd", messages=MESSAGES) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == TEXT


def test_text_completions_arrive_whole_and_in_pieces(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="adaptd", prompt=["a b", "c"], max_tokens=3)
    assert [choice.text for choice in whole.choices] == ["Keep the wound"] * 2
    assert whole.choices[0].finish_reason == "length"
    pieces = client.completions.create(model="adaptd", prompt=[1, 2, 3], stream=True, extra_body={"top_k": 5})
    assert "".join(piece.choices[0].text for piece in pieces) == TEXT


def test_the_request_id_header_and_the_domain_reach_the_service(client: openai.OpenAI, service: Any) -> None:
    headers = {"x-adaptd-domain": "math", "x-adaptd-no-store": "1", "x-request-id": "from-sdk"}
    answer = client.completions.with_raw_response.create(model="adaptd", prompt="a", extra_headers=headers)
    assert answer.headers["x-request-id"] == "from-sdk"
    assert (service.seen[0].domain, service.seen[0].store) == ("math", False)


def test_models_are_listed_and_retrieved(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["adaptd", "pocket/target"]
    assert client.models.retrieve("pocket/target").owned_by == "adaptd"


def test_errors_become_the_clients_own_exceptions(client: openai.OpenAI, service: Any) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="gpt-4", messages=MESSAGES)
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="99 tokens but the context holds 64") as long:
        client.completions.create(model="adaptd", prompt=[1] * 99)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="temperature") as hot:
        client.completions.create(model="adaptd", prompt="a", temperature=9)
    assert hot.value.param == "temperature"
    service.is_ready = (False, "draining")
    with pytest.raises(openai.InternalServerError) as draining:
        client.completions.create(model="adaptd", prompt="a")
    assert draining.value.status_code == 503


def test_the_clients_own_retry_gets_over_a_full_queue(client: openai.OpenAI, service: Any, overloaded: Any) -> None:
    service.refuse_first = overloaded
    patient = client.with_options(max_retries=1)

    class Recovering(list[Any]):
        def append(self, item: Any) -> None:
            super().append(item)
            if len(self) == 2:
                service.refuse_first = None

    service.seen = Recovering()
    assert patient.completions.create(model="adaptd", prompt="a").choices[0].text == TEXT
    assert len(service.seen) == 2


def test_an_error_in_the_middle_of_a_stream_is_raised_by_the_client(client: openai.OpenAI, service: Any) -> None:
    service.fail_after = (3, DecoderStopped("decoder 0 died; send the request again"))
    received: list[str] = []
    stream = client.completions.create(model="adaptd", prompt="a", stream=True)
    with pytest.raises(openai.APIError, match="decoder 0 died"):
        received.extend(chunk.choices[0].text for chunk in stream)
    assert received == ["Keep", " the", " wound"]


def test_a_client_that_closes_its_stream_aborts_every_choice(
    client: openai.OpenAI, service: Any, eventually: Any
) -> None:
    service.wait_after = 4
    stream = client.completions.create(model="adaptd", prompt="a", stream=True, n=3)
    next(iter(stream))
    stream.close()
    assert eventually(lambda: service.aborted == 3)
    assert service.completed == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_before_the_first_token_aborts_the_generation(
    client: openai.OpenAI, service: Any, eventually: Any, stream: bool
) -> None:
    service.wait_after = 0
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.3).completions.create(model="adaptd", prompt="a", n=2, stream=stream)
    assert eventually(lambda: service.aborted == 2)


def test_a_client_that_leaves_while_a_whole_answer_is_made_aborts_it(
    client: openai.OpenAI, service: Any, eventually: Any
) -> None:
    service.wait_after = 5
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.3).chat.completions.create(model="adaptd", messages=MESSAGES)
    assert eventually(lambda: service.aborted == 1)


def test_the_async_client_runs_many_requests_side_by_side(url: str, service: Any) -> None:
    async def run() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as sdk:
            answers = await asyncio.gather(*(sdk.completions.create(model="adaptd", prompt="a") for _ in range(20)))
            return [answer.choices[0].text for answer in answers]

    assert asyncio.run(run()) == [TEXT] * 20
    assert service.aborted == 0


def test_a_client_that_drops_the_connection_without_a_word_harms_nobody(
    client: openai.OpenAI, url: str, service: Any, eventually: Any
) -> None:
    service.wait_after = 1
    host, port = url.removeprefix("http://").split(":")
    body = b'{"prompt": "a", "stream": true}'
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    with socket.create_connection((host, int(port))) as raw:
        raw.sendall(head.encode() + body)
        assert raw.recv(100).startswith(b"HTTP/1.1 200")
    assert eventually(lambda: service.aborted == 1)
    service.wait_after = None
    assert client.completions.create(model="adaptd", prompt="a").choices[0].text == TEXT
