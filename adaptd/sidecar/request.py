"""What the proxy asks of the server beyond what the client asked: decided from the request's bytes alone, no I/O.

Whatever is unusual is left alone: a request whose fields have other types than the API's, or a feature that changes what
log-probabilities mean, goes to the server as it came. The answer to a request that is left alone is left alone too.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Literal

from adaptd.sidecar.splice import NotJson, set_members

Kind = Literal["chat", "completion"]

PATHS: dict[str, Kind] = {"/v1/chat/completions": "chat", "/v1/completions": "completion"}

#: Fields that leave the request alone when set: they change which tokens are in the answer, or how many answers there are.
_UNUSUAL = ("echo", "use_beam_search", "best_of", "prompt_embeds")
#: Fields that keep a request from being captured: what comes back would not be the target's own distribution over its own
#: text, or not its alone. Such a request is still counted.
_UNCAPTURED = (
    "logprob_token_ids",
    "prompt_logprobs",
    "return_tokens_as_token_ids",
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "kv_transfer_params",
    "ec_transfer_params",
    "logits_processors",
)


@dataclass(frozen=True, slots=True)
class Asked:
    """Which additions are in the request that goes on, and so must be taken out of the answer again."""

    token_ids: bool = False
    logprobs: bool = False
    usage: bool = False
    """`stream_options.include_usage`: the last event carries the per-step acceptance, and goes."""

    @property
    def any(self) -> bool:
        """Whether anything was added."""
        return self.token_ids or self.logprobs or self.usage


@dataclass(frozen=True, slots=True)
class Plan:
    """One request to the server."""

    kind: Kind
    body: bytes
    """What is sent on."""
    asked: Asked
    stream: bool
    why_not: str | None
    """Why the request is not captured, in a word; None if it is."""
    sampling: dict[str, Any] = field(default_factory=dict)
    """temperature, top_p and top_k, where the client named them."""

    @property
    def captured(self) -> bool:
        """Whether the answer becomes a trace."""
        return self.why_not is None


def plan(
    path: str,
    body: bytes,
    *,
    top_logprobs: int,
    capture: str | None,
    ask_usage: bool = True,
    models: Collection[str] | None = None,
) -> Plan | None:
    """What to send for this request; None to leave it alone.

    Args:
      path: route of the request.
      body: as the client sent it.
      top_logprobs: target tokens to ask for at each position; 0 asks for none.
      capture: None to capture, else why not, in a word.
      ask_usage: False where the server sends usage with every stream anyway (--enable-force-include-usage).
      models: names of the target itself; a request for another one (a LoRA adapter) is left alone. None: any.
    """
    kind = PATHS.get(path)
    if kind is None:
        return None
    try:
        text = body.decode()
        asked = json.loads(text)
    except ValueError:
        return None
    if not isinstance(asked, dict) or _is_unusual(kind, asked, models):
        return None
    why_not = capture or (None if top_logprobs else "no log-probabilities") or _why_not(kind, asked)
    additions: dict[str, Any] = {}
    if why_not is None:
        additions |= {"return_token_ids": True, "return_tokens_as_token_ids": True}
        additions |= {"logprobs": True, "top_logprobs": top_logprobs} if kind == "chat" else {"logprobs": top_logprobs}
    stream = bool(asked.get("stream"))
    single = (asked.get("n") or 1) == 1 and _prompts(asked) == 1
    options = asked.get("stream_options") or {}
    usage = ask_usage and stream and single and not options.get("include_usage")
    if usage:
        # Alone, continuous_usage_stats does nothing; beside include_usage it would add usage to every event.
        quiet = {"continuous_usage_stats": False} if "continuous_usage_stats" in options else {}
        additions["stream_options"] = {**options, **quiet, "include_usage": True}
    try:
        sent = set_members(text, additions).encode() if additions else body
    except (NotJson, UnicodeEncodeError):
        return None
    return Plan(
        kind=kind,
        body=sent,
        asked=Asked(
            token_ids=why_not is None and not asked.get("return_token_ids"), logprobs=why_not is None, usage=usage
        ),
        stream=stream,
        why_not=why_not,
        sampling={name: asked[name] for name in ("temperature", "top_p", "top_k") if asked.get(name) is not None},
    )


def _is_unusual(kind: Kind, asked: dict[str, Any], models: Collection[str] | None) -> bool:
    model, n, options = asked.get("model"), asked.get("n"), asked.get("stream_options")
    text = asked.get("messages" if kind == "chat" else "prompt")
    return (
        any(asked.get(name) for name in _UNUSUAL)
        or not (model is None or isinstance(model, str))
        or (models is not None and bool(model) and model not in models)
        or not isinstance(asked.get("stream"), bool | None)
        or not (n is None or (type(n) is int and n >= 1))
        or not isinstance(asked.get("return_token_ids"), bool | None)
        or not isinstance(options, dict | None)
        or not isinstance((options or {}).get("include_usage"), bool | None)
        or not isinstance((options or {}).get("continuous_usage_stats"), bool | None)
        or (options is not None and not asked.get("stream"))
        or not text
        or not isinstance(text, list if kind == "chat" else str | list)
        or any(
            not (
                asked.get(name) is None or (isinstance(asked[name], int | float) and not isinstance(asked[name], bool))
            )
            for name in ("temperature", "top_p", "top_k")
        )
    )


def _why_not(kind: Kind, asked: dict[str, Any]) -> str | None:
    """Why this request is not captured, in a word; None if it is."""
    if any(asked.get(name) is not None for name in _UNCAPTURED):
        return "special"
    logprobs = asked.get("logprobs")
    if (kind == "chat" and (logprobs not in (None, False) or asked.get("top_logprobs") not in (None, 0))) or (
        kind == "completion" and logprobs is not None
    ):
        # Their tokens come as text, which does not name them; asking for ids instead would change the client's answer.
        return "client's logprobs"
    choice, format_ = asked.get("tool_choice"), asked.get("response_format")
    if choice not in (None, "auto", "none") or (format_ is not None and format_ != {"type": "text"}):
        return "constrained"
    if kind == "chat" and any(_has_media(message) for message in asked["messages"]):
        return "media"
    return None


def _has_media(message: Any) -> bool:
    content = message.get("content") if isinstance(message, dict) else None
    return isinstance(content, list) and any(not isinstance(p, dict) or p.get("type") != "text" for p in content)


def _prompts(asked: dict[str, Any]) -> int:
    """How many prompts a completion has; a list of token ids is one."""
    prompt = asked.get("prompt")
    return len(prompt) if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else 1
