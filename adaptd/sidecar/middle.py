"""Events from the middle of a stream, which are nearly all of them, put back without being parsed.

vLLM writes the members of such an event in one order. Inside a JSON string a quotation mark always follows a backslash, so
`,"finish_reason":null` can only be a member: where it stands once, and what is before and behind it is as expected, the
members to be taken out are found by searching bytes. Whatever looks otherwise is for `adaptd.sidecar.answer` to walk.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from adaptd.sidecar.request import Asked

_HEAD = re.compile(
    rb'data: \{"id":"[^"\\]*","object":"[^"\\]*","created":\d+,"model":"[^"\\]*","choices":\[\{"index":(\d+),'
    rb'(?:"delta":\{"|"text":")'
)
_TAIL = re.compile(
    rb',"finish_reason":null(?:,"stop_reason":null)?(?:,"prompt_token_ids":null)?'
    rb'(?:,"token_ids":(?:null|\[([\d,]+)\]))?\}\](?:,"usage":null)?\}'
)
_FINISH, _FINISH_NULL, _LOGPROBS = b',"finish_reason":', b',"finish_reason":null', b',"logprobs":'
#: How log-probabilities begin, and the brackets that only their end has.
_FORMS = ((b'{"content":[{"token":"', b"}]}]}"), (b'{"text_offset":[', b"}]}"))


class Middle(NamedTuple):
    """One event that goes on with one choice."""

    choice: int
    token_ids: list[int]
    logprobs: bytes
    """JSON text as the server sent it, to be parsed where there is time; empty if there is none of ours."""
    restored: bytes


def middle(event: bytes, asked: Asked) -> Middle | None:
    """The event if it is of this kind; None if it has to be walked."""
    head = _HEAD.match(event)
    at = event.find(_FINISH)
    if head is None or at < 0 or event.rfind(_FINISH) != at:
        return None
    tail = _TAIL.fullmatch(event, at)
    if tail is None:
        return None
    behind = event[at:]
    ids = tail.group(1)
    if ids and asked.token_ids:
        start, end = tail.span(1)
        behind = event[at : start - 1] + b"null" + event[end + 1 :]
    logprobs, before = b"", event[:at]
    if asked.logprobs and not before.endswith(b',"logprobs":null'):
        start = before.find(_LOGPROBS, head.end())
        logprobs = before[start + len(_LOGPROBS) :]
        if start < 0 or not _is_logprobs(logprobs):
            return None
        before = before[:start] + b',"logprobs":null'
    tokens = [int(token) for token in ids.split(b",")] if ids else []
    return Middle(int(head.group(1)), tokens, logprobs, before + behind)


def unparsed_logprobs(text: str, at: int) -> tuple[bytes, int] | None:
    """The log-probabilities of a choice that start at `at` and where they end; None if they have to be walked."""
    end = text.find(_FINISH.decode(), at)
    found = text[at : max(at, end)].encode()
    return (found, end) if _is_logprobs(found) else None


def _is_logprobs(text: bytes) -> bool:
    """Whether this looks like the log-probabilities of one choice and nothing else."""
    return any(text.startswith(start) and text.find(end) == len(text) - len(end) for start, end in _FORMS)
