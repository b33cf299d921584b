"""Events that are put back without being parsed: what comes of them is what walking them gives, and nothing else is taken."""

import json
from typing import Any

import numpy as np
import pytest

from adaptd.sidecar import answer
from adaptd.sidecar.answer import Seen, StreamRestorer, restore
from adaptd.sidecar.middle import middle
from adaptd.sidecar.request import Asked, Plan
from adaptd.sidecar.traces import Incomplete, _rows

ALL, COUNTED, OWN_IDS = (
    Asked(token_ids=True, logprobs=True, usage=True),
    Asked(usage=True),
    Asked(logprobs=True, usage=True),
)
#: What a text can hold that looks like what is searched for.
TEXTS = ("hello", 'a "quote" \\', ',"finish_reason":null}]}', '"logprobs":{"content":[{"token":"', "é☃\u2028", '{"', "")


def position(*tokens: int) -> dict[str, Any]:
    top = [{"token": f"token_id:{t}", "logprob": -0.5 * i - 1e-05, "bytes": [116, 34]} for i, t in enumerate(tokens)]
    return {**top[0], "top_logprobs": top}


CHAT = {"content": [position(5, 6, 7), position(8, 5, 9)]}
TEXT = {"text_offset": [0], "token_logprobs": [-0.1], "tokens": ["token_id:5"], "top_logprobs": [{"token_id:5": -0.1}]}


def event(kind: str, text: str, logprobs: Any = None, ids: Any = None, **more: Any) -> bytes:
    part = {"delta": {"content": text}} if kind == "chat" else {"text": text}
    choice = {"index": 0, **part, "logprobs": logprobs, "finish_reason": None, **more, "token_ids": ids}
    body = {"id": "c-1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
    return b"data: " + json.dumps(body, separators=(",", ":"), ensure_ascii=False).encode()


def walked(data: bytes, asked: Asked, monkeypatch: pytest.MonkeyPatch) -> tuple[bytes, Seen]:
    with monkeypatch.context() as patched:
        patched.setattr(answer, "middle", lambda *_: None)
        patched.setattr(answer, "unparsed_logprobs", lambda *_: None)
        restorer = StreamRestorer(Plan("chat", b"", asked, True, None))
        return restorer.feed(data + b"\n\n"), restorer.seen


@pytest.mark.parametrize("asked", [ALL, COUNTED, OWN_IDS])
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize(("kind", "logprobs"), [("chat", CHAT), ("chat", None), ("text", TEXT), ("text", None)])
def test_an_event_is_put_back_as_if_it_had_been_walked(
    kind: str, logprobs: Any, text: str, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = event(kind, text, logprobs, [5, 8] if logprobs else None)
    found = middle(data, asked)
    expected, seen = walked(data, asked, monkeypatch)
    assert found is not None
    assert found.restored + b"\n\n" == expected
    assert found.token_ids == seen.choices[0].token_ids
    whole = [dict(row) for piece in seen.choices[0].logprobs for row in _rows(piece)]
    assert [dict(row) for row in _rows(found.logprobs)] == whole if found.logprobs else not whole


@pytest.mark.parametrize(
    "data",
    [
        event("chat", "x").replace(b'"finish_reason":null', b'"finish_reason":"stop"'),
        event("chat", "x").replace(b'{"content":"x"}', b"{}"),
        event("chat", "x")[:-1] + b',"system_fingerprint":"f"}',
        event("chat", "x").replace(
            b'"choices":[', b'"choices":[{"index":1,"delta":{"content":"y"},"finish_reason":null},'
        ),
        event("chat", "x", {**CHAT, "more": 1}),
        event("chat", "x", CHAT).replace(b',"finish_reason"', b',"more":{"a":[{"b":1}]},"finish_reason"'),
        event("text", "x", ids=None).replace(b'"token_ids":null', b'"prompt_token_ids":[1],"token_ids":[2]'),
        event("chat", "x").replace(b":", b": "),
        b'data: {"error":{"message":"x","finish_reason":null}}',
        b"data: [DONE]",
    ],
)
def test_what_looks_otherwise_is_left_to_be_walked(data: bytes) -> None:
    assert middle(data, ALL) is None


def test_an_answer_that_comes_whole_keeps_its_log_probabilities_unparsed() -> None:
    data = event("chat", "x", CHAT, [5, 8])[len(b"data: ") :]
    restored, seen = restore(data, Plan("chat", b"", ALL, False, None))
    assert json.loads(restored)["choices"][0]["logprobs"] is None
    assert isinstance(seen.choices[0].logprobs[0], bytes)
    assert json.loads(seen.choices[0].logprobs[0]) == CHAT


def test_the_pairs_of_an_unparsed_answer_are_those_of_the_parsed_one() -> None:
    rng = np.random.default_rng(0)
    content = [position(*(int(t) for t in rng.choice(50, size=9))) for _ in range(40)]
    # Emitted from below the list, and from its middle.
    content[3] = {"token": "token_id:99", "logprob": -9.0, "bytes": [], "top_logprobs": content[3]["top_logprobs"]}
    content[4]["token"] = content[4]["top_logprobs"][5]["token"]
    data = json.dumps({"content": content}, separators=(",", ":")).encode()
    assert list(_rows(data)) == list(_rows(json.loads(data)))


@pytest.mark.parametrize(
    "harm", [(b"token_id:6", b"What"), (b'"logprob":-0.5', b'"logprob":null'), (b'"content"', b'"x"')]
)
def test_unparsed_log_probabilities_that_are_not_as_expected_are_refused(harm: tuple[bytes, bytes]) -> None:
    data = json.dumps(CHAT, separators=(",", ":")).encode()
    with pytest.raises(Incomplete):
        list(_rows(data.replace(*harm, 1)))
