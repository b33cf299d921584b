"""Request bodies of the OpenAI-compatible routes, their limits, and how they become `CompletionInput` fields.

A field that OpenAI clients may send and adaptd does not know is ignored, as vLLM does. A field whose meaning is known but
cannot be honoured is refused when it asks for something: a client that wants JSON mode must not get prose and believe it
is JSON.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt

from adaptd.server.errors import InvalidRequest

MAX_CHOICES = 8
MAX_PROMPTS = 64
MAX_SEQUENCES = 64
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_MESSAGES = 4096
MAX_SEED = 2**63 - 1

#: OpenAI's default for /v1/completions; a chat answer may fill the context.
DEFAULT_COMPLETION_TOKENS = 16

StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
TokenIds = list[StrictInt]


class StreamOptions(BaseModel):
    """Options of a streamed answer."""

    include_usage: bool = False


class GenerationRequest(BaseModel):
    """What both routes share. Limits are OpenAI's where it has them; `top_k` and `ignore_eos` are vLLM's extensions."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    model: str | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1)
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    seed: int | None = Field(default=None, ge=-(2**63), le=MAX_SEED)
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False

    # Known and not honoured: see `refuse_unsupported`.
    logit_bias: Any = None
    presence_penalty: Any = None
    frequency_penalty: Any = None
    repetition_penalty: Any = None
    min_p: Any = None
    min_tokens: Any = None
    stop_token_ids: Any = None
    include_stop_str_in_output: Any = None
    response_format: Any = None
    structured_outputs: Any = None
    logprobs: Any = None
    top_logprobs: Any = None
    prompt_logprobs: Any = None
    best_of: Any = None
    echo: Any = None
    suffix: Any = None

    @property
    def choices(self) -> int:
        """How many answers per prompt."""
        return self.n or 1

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self) -> Sampling:
        """The sampling settings with OpenAI's defaults filled in."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Sampling(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=max(self.top_k or 0, 0),
            seed=self.seed,
            stop=tuple(stop),
            ignore_eos=self.ignore_eos,
        )

    def requested_tokens(self) -> int | None:
        """The length of an answer that the client asked for, in tokens; None if it did not say."""
        return self.max_tokens

    def default_tokens(self, room: int) -> int:
        """The length of an answer when the client did not say, given how many tokens the context leaves."""
        return room

    def refuse_unsupported(self) -> None:
        """Raise if the request asks for something that adaptd would silently not do.

        Raises:
            InvalidRequest: naming the parameter, its value and the rule.
        """
        for name, (allowed, rule) in UNSUPPORTED.items():
            value = getattr(self, name)
            if value is not None and value not in allowed:
                shown = value if isinstance(value, bool | int | float) else type(value).__name__
                raise InvalidRequest(f"{name} ({shown}) is not supported: {rule}", param=name, code="unsupported_value")
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest(
                "stream_options is only allowed when stream is true; remove it or stream", param="stream_options"
            )
        if self.best_of not in (None, self.choices):
            raise InvalidRequest(
                f"best_of ({_scalar(self.best_of)}) must equal n ({self.choices}); adaptd does not rank answers",
                param="best_of",
                code="unsupported_value",
            )


#: Parameter -> the values that ask for nothing, and the rule for all others.
UNSUPPORTED: Mapping[str, tuple[Sequence[Any], str]] = {
    "logit_bias": (({},), "sampling is from the target's own distribution; leave it out"),
    "presence_penalty": ((0,), "sampling is from the target's own distribution; it must be 0"),
    "frequency_penalty": ((0,), "sampling is from the target's own distribution; it must be 0"),
    "repetition_penalty": ((1,), "sampling is from the target's own distribution; it must be 1"),
    "min_p": ((0,), "use top_p or top_k; it must be 0"),
    "min_tokens": ((0,), "it must be 0; ignore_eos forces the full length"),
    "stop_token_ids": (([],), "use stop strings"),
    "include_stop_str_in_output": ((False,), "stop strings are never part of the answer; it must be false"),
    "response_format": (({"type": "text"},), 'only {"type": "text"} is'),
    "structured_outputs": (({},), "constrained decoding is not available; leave it out"),
    "logprobs": ((False,), "log-probabilities are not returned; leave it out"),
    "top_logprobs": ((0,), "log-probabilities are not returned; leave it out"),
    "prompt_logprobs": ((), "log-probabilities are not returned; leave it out"),
    "echo": ((False,), "the prompt is not returned; it must be false"),
    "suffix": (("",), "text is only continued at its end; leave it out"),
}


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampling settings, every default filled in."""

    temperature: float
    top_p: float
    top_k: int
    seed: int | None
    stop: tuple[str, ...]
    ignore_eos: bool


class CompletionRequest(GenerationRequest):
    """Body of POST /v1/completions."""

    prompt: (
        str
        | Annotated[list[str], Field(max_length=MAX_PROMPTS)]
        | TokenIds
        | Annotated[list[TokenIds], Field(max_length=MAX_PROMPTS)]
    )

    def prompts(self) -> list[str | list[int]]:
        """The prompts, each text or token ids.

        Raises:
            InvalidRequest: there is none, or one is empty.
        """
        prompt: Any = self.prompt
        single = isinstance(prompt, str) or (bool(prompt) and isinstance(prompt[0], int))
        prompts: list[str | list[int]] = [prompt] if single else prompt
        if not prompts:
            raise InvalidRequest("prompt ([]) must not be empty; send text or token ids", param="prompt")
        for index, item in enumerate(prompts):
            if not item:
                where = "prompt" if single else f"prompt[{index}]"
                raise InvalidRequest(f"{where} must not be empty; send text or token ids", param="prompt")
        return prompts

    def default_tokens(self, room: int) -> int:
        """OpenAI's default, as far as the context leaves room."""
        return min(DEFAULT_COMPLETION_TOKENS, room)


class TextPart(BaseModel):
    """One part of a message's content; only text is served."""

    type: str
    text: str | None = None


class Message(BaseModel):
    """One message of a conversation."""

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None

    def rendered(self, index: int) -> dict[str, Any]:
        """The message for the chat template: parts joined to one string, absent fields left out.

        Raises:
            InvalidRequest: a part is not text, or there is no content where there must be some.
        """
        where = f"messages[{index}].content"
        content = self.content
        if isinstance(content, list):
            for part in content:
                if part.type != "text" or part.text is None:
                    raise InvalidRequest(
                        f"{where} has a part of type {part.type[:40]!r}; only text parts are supported",
                        param="messages",
                        code="unsupported_value",
                    )
            content = "".join(part.text or "" for part in content)
        if content is None and not (self.role == "assistant" and self.tool_calls):
            raise InvalidRequest(f"{where} (null) must be text or a list of text parts", param="messages")
        message = {"role": self.role, "content": content}
        optional = {"name": self.name, "tool_calls": self.tool_calls, "tool_call_id": self.tool_call_id}
        return message | {key: value for key, value in optional.items() if value is not None}


class ChatRequest(GenerationRequest):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(max_length=MAX_MESSAGES)]
    max_completion_tokens: int | None = Field(default=None, ge=1)
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto", "none", "required"] | dict[str, Any] | None = None

    def rendered_messages(self) -> list[dict[str, Any]]:
        """The conversation for the chat template.

        Raises:
            InvalidRequest: there is no message, or one cannot be served.
        """
        if not self.messages:
            raise InvalidRequest("messages ([]) must not be empty; send at least one message", param="messages")
        rendered = [message.rendered(index) for index, message in enumerate(self.messages)]
        if not any(message["content"] or message.get("tool_calls") for message in rendered):
            raise InvalidRequest("messages have no content at all; the prompt must not be empty", param="messages")
        return rendered

    def offered_tools(self) -> list[dict[str, Any]] | None:
        """The tools for the chat template; none if the client forbids their use.

        Raises:
            InvalidRequest: the client wants a call to be forced, which takes constrained decoding.
        """
        if self.tool_choice not in (None, "auto", "none"):
            shown = self.tool_choice if isinstance(self.tool_choice, str) else "a named tool"
            raise InvalidRequest(
                f"tool_choice ({shown}) is not supported: only auto and none are; a call cannot be forced",
                param="tool_choice",
                code="unsupported_value",
            )
        return None if self.tool_choice == "none" else self.tools or None

    def requested_tokens(self) -> int | None:
        """The length of an answer that the client asked for, under its new name or its old one."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


def _scalar(value: Any) -> Any:
    """The value if it is a number, else its type: an error never repeats a client's text."""
    return value if isinstance(value, int | float) else type(value).__name__
