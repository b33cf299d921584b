"""The server's answer as the client would have had it, and what was learned from it on the way. Pure: bytes to bytes.

What vLLM returns without our additions is the same text with `null` where they stand now, so each is put back to `null`.
Two things need more. With `include_usage` the system fingerprint moves from the last choice to the usage event: the last
choice is held back until that event is there (it follows at once), which then goes. And where a tool or reasoning parser
holds text back, asking for token ids makes vLLM send events without content, which go too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from adaptd.sidecar.middle import middle, unparsed_logprobs
from adaptd.sidecar.request import Asked, Plan
from adaptd.sidecar.splice import Edit, NotJson, apply, skip_space, value_at, walk_array, walk_object

_EVENT_END = b"\n\n"
_DATA = b"data: "
_DONE = b"[DONE]"


@dataclass(slots=True)
class ChoiceSeen:
    """One answer's tokens."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[str, Any] | bytes] = field(default_factory=list)
    """Log-probabilities as the server sent them, one piece an event; bytes are JSON that nobody has parsed yet."""
    prompt_token_ids: list[int] | None = None
    finish_reason: str | None = None


@dataclass(slots=True)
class Seen:
    """What an answer said: tokens by choice, and the speculative figures of the whole."""

    choices: dict[int, ChoiceSeen] = field(default_factory=dict)
    prompt_token_ids: list[int] | None = None
    answer_id: str = ""
    fingerprint: str | None = None
    usage: dict[str, Any] | None = None
    speculative: dict[str, Any] | None = None

    def choice(self, index: int) -> ChoiceSeen:
        """The record of choice `index`."""
        return self.choices.setdefault(index, ChoiceSeen())

    @property
    def tokens(self) -> int:
        """Tokens of the answer, by the server's own count; 0 if it does not say."""
        found = (self.usage or {}).get("completion_tokens")
        return found if isinstance(found, int) else 0

    @property
    def finished(self) -> bool:
        """Whether every choice seen came to its end."""
        return bool(self.choices) and all(c.finish_reason is not None for c in self.choices.values())


@dataclass(slots=True)
class _Body:
    """One JSON text of an answer, walked once."""

    edits: list[Edit] = field(default_factory=list)
    end: int = 0
    keys: set[str] = field(default_factory=set)
    choices: int = 0
    finish: bool = False
    empty_deltas: int = 0
    fingerprint: str | None = None


def _walk(text: str, asked: Asked, seen: Seen) -> _Body:
    """Read one JSON text of an answer into `seen`; the edits that put it back.

    Raises:
      NotJson: it is none.
    """
    body = _Body()

    def top(key: str, at: int) -> int:
        body.keys.add(key)
        if key == "choices":
            return walk_array(text, at, lambda start: _walk_choice(text, start, asked, seen, body))
        value, end = value_at(text, at)
        if key == "prompt_token_ids" and value is not None:
            seen.prompt_token_ids = value
            if asked.token_ids:
                body.edits.append(Edit(at, end, "null"))
        elif key == "id":
            seen.answer_id = str(value)
        elif key == "system_fingerprint" and value is not None:
            body.fingerprint = text[at:end]
            seen.fingerprint = str(value)
        elif key == "usage" and isinstance(value, dict):
            seen.usage = value
        elif key == "metrics" and isinstance(value, dict):
            found = value.get("speculative_decoding")
            seen.speculative = found if isinstance(found, dict) else None
        return end

    body.end = walk_object(text, skip_space(text, 0), top)
    return body


def _walk_choice(text: str, at: int, asked: Asked, seen: Seen, body: _Body) -> int:
    values: dict[str, Any] = {}
    edits: list[Edit] = []

    def member(key: str, start: int) -> int:
        if key == "logprobs" and asked.logprobs and (found := unparsed_logprobs(text, start)):
            values[key] = found[0]
            edits.append(Edit(start, found[1], "null"))
            return found[1]
        value, end = value_at(text, start)
        values[key] = value
        mine = asked.logprobs if key == "logprobs" else asked.token_ids and key in ("token_ids", "prompt_token_ids")
        if mine and value is not None:
            edits.append(Edit(start, end, "null"))
        return end

    end = walk_object(text, at, member)
    choice = seen.choice(values["index"] if isinstance(values.get("index"), int) else 0)
    choice.token_ids += values.get("token_ids") or []
    if asked.logprobs and isinstance(values.get("logprobs"), dict | bytes):
        choice.logprobs.append(values["logprobs"])
    choice.prompt_token_ids = values.get("prompt_token_ids") or choice.prompt_token_ids
    choice.finish_reason = values.get("finish_reason") or choice.finish_reason
    body.choices += 1
    body.finish = body.finish or values.get("finish_reason") is not None
    body.empty_deltas += values.get("delta") == {} and values.get("finish_reason") is None
    body.edits += edits
    return end


def restore(data: bytes, plan: Plan) -> tuple[bytes, Seen]:
    """The whole answer to a request that was not streamed; unchanged if it is not what was expected."""
    seen = Seen()
    try:
        text = data.decode()
        body = _walk(text, plan.asked, seen)
    except (NotJson, UnicodeDecodeError):
        return data, Seen()
    return (apply(text, body.edits).encode() if body.edits else data), seen


class StreamRestorer:
    """Server-sent events in, the client's events out. Holds back an event that is not complete, and the last choice
    until the usage event that was added has come.
    """

    def __init__(self, plan: Plan) -> None:
        self._asked = plan.asked
        self._pending = b""
        self._held: tuple[str, _Body] | None = None
        self.seen = Seen()
        self.done = False

    def feed(self, data: bytes) -> bytes:
        """What the client gets for these bytes, maybe nothing yet."""
        self._pending += data
        if _EVENT_END not in self._pending:
            return b""
        *complete, self._pending = self._pending.split(_EVENT_END)
        return b"".join(self._event(event) for event in complete)

    def close(self) -> bytes:
        """What is left when the server's answer ended."""
        left, self._pending = self._release(None) + self._pending, b""
        return left

    def _event(self, event: bytes) -> bytes:
        if not event.startswith(_DATA) or event[len(_DATA) :] == _DONE:
            self.done = self.done or event == _DATA + _DONE
            return self._release(None) + event + _EVENT_END
        if self._held is None and (found := middle(event, self._asked)) is not None:
            choice = self.seen.choice(found.choice)
            choice.token_ids += found.token_ids
            if found.logprobs:
                choice.logprobs.append(found.logprobs)
            return found.restored + _EVENT_END
        try:
            text = event[len(_DATA) :].decode()
            body = _walk(text, self._asked, self.seen)
        except (NotJson, UnicodeDecodeError):
            return self._release(None) + event + _EVENT_END
        if "choices" not in body.keys:  # an error in mid-stream
            return self._release(None) + event + _EVENT_END
        if self._asked.usage and not body.choices:
            return self._release(body.fingerprint)
        before = self._release(None)
        if self._asked.token_ids and body.choices and body.empty_deltas == body.choices:
            return before
        if self._asked.usage and body.finish:
            self._held = (text, body)
            return before
        return before + _encoded(text, body.edits)

    def _release(self, fingerprint: str | None) -> bytes:
        """The event that was held back, with the fingerprint that it would have had."""
        if self._held is None:
            return b""
        (text, body), self._held = self._held, None
        if fingerprint is not None and "system_fingerprint" not in body.keys:
            body.edits.append(Edit(body.end - 1, body.end - 1, f',"system_fingerprint":{fingerprint}'))
        return _encoded(text, body.edits)


def _encoded(text: str, edits: list[Edit]) -> bytes:
    return _DATA + (apply(text, edits) if edits else text).encode() + _EVENT_END
