"""POST /v1/chat/completions and /v1/completions: check, fan out to one generator per choice, answer whole or streamed.

A refusal that comes before the first token is an HTTP error also for a stream, because the response starts with the
first chunk; a later one is an error event, which OpenAI's client raises.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from adaptd import events
from adaptd.errors import ContextLengthExceeded, Overloaded, RequestRefused, UnknownModel
from adaptd.log import logger
from adaptd.server.answers import CHAT, DONE, TEXT, Answer, Choice, Dialect, event
from adaptd.server.errors import InvalidRequest, bug_body, refusal_body, request_id
from adaptd.server.schemas import MAX_SEQUENCES, ChatRequest, CompletionRequest, GenerationRequest
from adaptd.server.service import Chunk, CompletionInput, Service
from adaptd.server.streams import EventStream, merged, unless_disconnected

_log = logger(__name__)

#: Names of domains and tenants become keys in Redis and labels in metrics.
_LABEL = re.compile(r"[A-Za-z0-9._-]{1,64}")
_SEEDS = 2**63


@dataclass(frozen=True, slots=True)
class Provenance:
    """What the x-adaptd headers of a request say."""

    domain: str | None
    tenant: str | None
    store: bool

    @staticmethod
    def of(request: Request) -> Provenance:
        """Read the headers.

        Raises:
            InvalidRequest: one has a value outside its rule.
        """
        labels = []
        for name in ("x-adaptd-domain", "x-adaptd-tenant"):
            value = request.headers.get(name)
            if value is not None and not _LABEL.fullmatch(value):
                raise InvalidRequest(
                    f"{name} ({value[:60]!r}) must be 1 to 64 letters, digits, dots, dashes or underscores", param=name
                )
            labels.append(value)
        no_store = request.headers.get("x-adaptd-no-store", "0").lower()
        if no_store not in ("0", "1", "false", "true"):
            raise InvalidRequest(
                f"x-adaptd-no-store ({no_store[:60]!r}) must be 1 or 0; nothing was stored", param="x-adaptd-no-store"
            )
        return Provenance(labels[0], labels[1], no_store in ("0", "false"))


def router(service: Service) -> APIRouter:
    """The two routes in front of `service`."""
    routes = APIRouter()

    @routes.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        model = _admitted(service, body)
        prompts = body.prompts()
        if len(prompts) * body.choices > MAX_SEQUENCES:
            raise InvalidRequest(
                f"prompt ({len(prompts)}) times n ({body.choices}) must be at most {MAX_SEQUENCES} answers a request",
                param="prompt",
            )
        ids = [tuple(service.encode(prompt) if isinstance(prompt, str) else prompt) for prompt in prompts]
        return await _answer(service, request, body, model, TEXT, ids)

    @routes.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        model = _admitted(service, body)
        ids = service.render_chat(body.rendered_messages(), body.offered_tools())
        return await _answer(service, request, body, model, CHAT, [tuple(ids)])

    return routes


def _admitted(service: Service, body: GenerationRequest) -> str:
    """The model that is meant; raises if the daemon is not ready, does not have it, or cannot do what is asked."""
    ready, state = service.ready()
    if not ready:
        raise Overloaded(f"the daemon is {state} and takes no requests; retry, or send this to another replica")
    body.refuse_unsupported()
    names = service.models()
    model = names[0] if body.model is None else body.model
    if model not in names:
        raise UnknownModel(f"the model {model[:100]!r} does not exist; this daemon serves {', '.join(names)}")
    return model


def _inputs(
    service: Service,
    request: Request,
    body: GenerationRequest,
    model: str,
    answer_id: str,
    prompts: Sequence[tuple[int, ...]],
) -> list[CompletionInput]:
    """One input per choice: the choices of the first prompt, of the second, and so on."""
    provenance, sampling = Provenance.of(request), body.sampling()
    inputs: list[CompletionInput] = []
    for prompt in prompts:
        max_tokens = _answer_length(service, body, prompt)
        for choice in range(body.choices):
            inputs.append(
                CompletionInput(
                    request_id=f"{answer_id}-{len(inputs)}",
                    client_request_id=request_id(request),
                    model=model,
                    prompt_ids=prompt,
                    max_tokens=max_tokens,
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    top_k=sampling.top_k,
                    seed=None if sampling.seed is None else (sampling.seed + choice) % _SEEDS,
                    stop=sampling.stop,
                    ignore_eos=sampling.ignore_eos,
                    domain=provenance.domain,
                    tenant=provenance.tenant,
                    store=provenance.store,
                    stream=bool(body.stream),
                )
            )
    return inputs


def _answer_length(service: Service, body: GenerationRequest, prompt: tuple[int, ...]) -> int:
    """How many tokens the answer may have; raises if the prompt is empty, not in the vocabulary, or does not fit."""
    limits = service.limits()
    if not prompt:
        raise InvalidRequest("the prompt must not be empty: it has no tokens", param="prompt")
    if (wrong := next((token for token in prompt if not 0 <= token < limits.vocabulary_size), None)) is not None:
        raise InvalidRequest(
            f"the token id {wrong} is not in the vocabulary; ids are 0 to {limits.vocabulary_size - 1}", param="prompt"
        )
    room = limits.context_length - len(prompt)
    if room < 1:
        raise ContextLengthExceeded(
            f"the prompt has {len(prompt)} tokens but the context holds {limits.context_length}, prompt and answer "
            "together; shorten the prompt"
        )
    requested = body.requested_tokens()
    if requested is None:
        return body.default_tokens(room)
    if requested > room:
        raise ContextLengthExceeded(
            f"the prompt has {len(prompt)} tokens and the answer may have {requested}, {len(prompt) + requested} "
            f"together, but the context holds {limits.context_length}; ask for at most {room}"
        )
    return requested


async def _answer(
    service: Service,
    request: Request,
    body: GenerationRequest,
    model: str,
    dialect: Dialect,
    prompts: Sequence[tuple[int, ...]],
) -> Response:
    answer_id = f"{dialect.id_prefix}{uuid.uuid4().hex}"
    inputs = _inputs(service, request, body, model, answer_id, prompts)
    answer = Answer(dialect, answer_id, model, [Choice(len(item.prompt_ids)) for item in inputs], body.choices)
    chunks = merged([service.generate(item) for item in inputs])
    if not body.stream:
        await unless_disconnected(request, _collect(chunks, answer))
        return JSONResponse(answer.whole())
    first = await unless_disconnected(request, _first(chunks))
    return EventStream(_events(request, first, chunks, answer, body.wants_usage), chunks)


async def _collect(chunks: AsyncGenerator[tuple[int, Chunk], None], answer: Answer) -> None:
    async for index, chunk in chunks:
        answer.add(index, chunk)


async def _first(chunks: AsyncGenerator[tuple[int, Chunk], None]) -> tuple[int, Chunk]:
    return await anext(chunks)


async def _events(
    request: Request,
    first: tuple[int, Chunk],
    rest: AsyncGenerator[tuple[int, Chunk], None],
    answer: Answer,
    with_usage: bool,
) -> AsyncGenerator[bytes, None]:
    try:
        for item in answer.events(*first, with_usage=with_usage):
            yield item
        async for index, chunk in rest:
            for item in answer.events(index, chunk, with_usage=with_usage):
                yield item
        if with_usage:
            yield answer.usage_event()
    except RequestRefused as exc:
        _log.warning(events.REQUEST_FAILED, request_id=request_id(request), error=type(exc).__name__)
        yield event(refusal_body(exc))
    except Exception as exc:
        _log.error(events.REQUEST_FAILED, request_id=request_id(request), error=type(exc).__name__)
        yield event(bug_body(request))
        yield DONE
        raise  # a bug: the server logs the traceback
    yield DONE
