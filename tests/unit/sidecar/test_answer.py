"""Answers put back as the client would have had them, from what vLLM 0.32 really sends (ids shortened)."""

import json
from typing import Any

import pytest

from adaptd.sidecar.answer import StreamRestorer, restore
from adaptd.sidecar.request import Asked, Plan

ALL = Asked(token_ids=True, logprobs=True, usage=True)
METRICS = (
    '{"speculative_decoding":{"num_spec_steps":1,"num_accepted_draft_tokens":1,"num_draft_tokens":4,"num_spec_tokens":4,'
    '"per_step_accepted":[1],"per_step_drafted":[4]}}'
)


def planned(asked: Asked = ALL, stream: bool = True) -> Plan:
    return Plan("chat", b"", asked, stream, None)


def logprobs(*tokens: int) -> str:
    return json.dumps({"content": [{"token": f"token_id:{t}", "logprob": -1e-05, "top_logprobs": []} for t in tokens]})


def event(delta: str, *, ids: str = "null", lp: str = "null", finish: str = "null", tail: str = "") -> str:
    reason = ',"stop_reason":null' if finish != "null" else ""
    return (
        f'data: {{"id":"c","object":"chat.completion.chunk","created":1,"model":"m","choices":[{{"index":0,"delta":{delta},'
        f'"logprobs":{lp},"finish_reason":{finish}{reason},"token_ids":{ids}}}]{tail}}}\n\n'
    )


FIRST = (
    'data: {{"id":"c","choices":[{{"index":0,"delta":{{"role":"assistant","content":""}},"logprobs":null,'
    '"finish_reason":null}}],"prompt_token_ids":{}}}\n\n'
)
USAGE = (
    f'data: {{"id":"c","choices":[],"usage":{{"completion_tokens":3}},'
    f'"system_fingerprint":"f-1","metrics":{METRICS}}}\n\n'
)
DONE = "data: [DONE]\n\n"
SERVED = (
    FIRST.format("[1,2]")
    + event('{"content":"h☃"}', ids="[5]", lp=logprobs(5))
    + event("{}", ids="[6]", lp=logprobs(6))
    + event('{"content":"i"}', ids="[7]", lp=logprobs(7), finish='"length"')
    + USAGE
    + DONE
)
DIRECT = (
    FIRST.format("null")
    + event('{"content":"h☃"}')
    + event('{"content":"i"}', finish='"length"', tail=',"system_fingerprint":"f-1"')
    + DONE
)


@pytest.mark.parametrize("size", [1, 2, 7, 64, 10**6])
def test_a_stream_is_put_back_however_it_is_cut(size: int) -> None:
    data, restorer = SERVED.encode(), StreamRestorer(planned())
    out = b"".join(restorer.feed(data[i : i + size]) for i in range(0, len(data), size)) + restorer.close()
    assert out.decode() == DIRECT
    seen = restorer.seen
    assert restorer.done
    assert seen.prompt_token_ids == [1, 2]
    assert seen.choices[0].token_ids == [5, 6, 7]
    assert len(seen.choices[0].logprobs) == 3
    assert seen.finished
    assert seen.speculative is not None
    assert seen.speculative["per_step_accepted"] == [1]


def test_each_event_leaves_as_soon_as_it_is_complete() -> None:
    restorer = StreamRestorer(planned())
    events = [e + "\n\n" for e in SERVED.split("\n\n")[:-1]]
    given = [restorer.feed(e.encode()) for e in events]
    assert [bool(g) for g in given] == [True, True, False, False, True, True], "one is dropped, the last choice waits"


def test_usage_that_the_client_asked_for_stays_where_it_is() -> None:
    restorer = StreamRestorer(planned(Asked(token_ids=True, logprobs=True)))
    assert USAGE in restorer.feed(SERVED.encode()).decode()


def test_a_stream_that_ends_without_usage_loses_nothing() -> None:
    restorer = StreamRestorer(planned())
    last = event('{"content":"i"}', ids="[7]", finish='"stop"')
    assert restorer.feed(last.encode()) == b""
    assert restorer.close().decode() == event('{"content":"i"}', finish='"stop"')
    assert not restorer.done


@pytest.mark.parametrize(
    "text",
    [
        'data: {"error":{"message":"m","code":500}}\n\n',
        "data: {broken\n\n",
        ": ping\n\n",
        "event: x\ndata: 1\n\n",
        "\n\n",
    ],
)
def test_what_is_not_known_passes(text: str) -> None:
    restorer = StreamRestorer(planned())
    assert restorer.feed(text.encode()).decode() + restorer.close().decode() == text


def whole(lp: str, ids: str, prompt: str) -> str:
    return (
        f'{{"id":"c","created":1,"choices":[{{"index":0,"message":{{"content":"h","reasoning":null}},"logprobs":{lp},'
        f'"finish_reason":"stop","token_ids":{ids}}}],"usage":{{"completion_tokens":1}},"prompt_token_ids":{prompt},'
        f'"metrics":{METRICS}}}'
    )


def test_a_whole_answer_is_put_back() -> None:
    data, seen = restore(whole(logprobs(5), "[5]", "[1]").encode(), planned(stream=False))
    assert data.decode() == whole("null", "null", "null")
    assert seen.choices[0].token_ids == [5]
    assert seen.usage == {"completion_tokens": 1}


def test_only_what_was_added_is_taken_out() -> None:
    served = whole(logprobs(5), "[5]", "[1]")
    for asked in (Asked(), Asked(usage=True)):
        assert restore(served.encode(), planned(asked, stream=False))[0].decode() == served
    kept = restore(served.encode(), planned(Asked(logprobs=True), stream=False))[0].decode()
    assert kept == whole("null", "[5]", "[1]")


@pytest.mark.parametrize("data", [b"", b"nonsense", b"[]", b'{"choices":{}}', b"\xff", b'{"choices":[1]}'])
def test_another_answer_passes_untouched(data: bytes) -> None:
    assert restore(data, planned(stream=False))[0] == data


def test_bytes_of_floats_are_not_touched() -> None:
    served = whole("null", "null", "null").replace('"created":1', '"created":1.50E-07')
    found: Any = restore(served.encode(), planned(stream=False))
    assert found[0].decode() == served
