"""The daemon as the HTTP layer sees it: prompts to tokens, requests to the pool, status and metrics back."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from adaptd.app.adaptation import Adaptation
from adaptd.app.daemon import Daemon
from adaptd.app.metrics import Metrics
from adaptd.decoding.request import DecodeRequest, Delta, SamplingParams
from adaptd.errors import DecoderStopped
from adaptd.models import load
from adaptd.models.chat import render_chat
from adaptd.report.split import Baseline
from adaptd.server.service import Chunk, CompletionInput, Limits, SpeculativeStats, Usage


class OperationsService:
    """Implements `adaptd.server.service.Operations` for any daemon."""

    def __init__(self, daemon: Adaptation) -> None:
        self._daemon = daemon
        self._metrics = Metrics(daemon)

    def ready(self) -> tuple[bool, str]:
        """Whether a request would be served now."""
        return self._daemon.ready()

    async def status(self, since: str | None) -> Mapping[str, Any]:
        """The daemon's status, with the trends since then if asked for."""
        # First: what cannot be read as a time is refused before the actors are asked.
        trends = {} if since is None else {"trends": await self._daemon.trending.read(since)}
        return {**await self._daemon.status(), **trends}

    async def report(self, since: str, baseline: Baseline, traces: int) -> Mapping[str, Any]:
        """A period in figures."""
        return await self._daemon.report(since, baseline, traces)

    def metrics(self) -> bytes:
        """Prometheus text."""
        return self._metrics.expose()

    async def checkpoints_list(self) -> Sequence[Mapping[str, Any]]:
        """Published versions."""
        return self._daemon.versions()

    async def promote(self, version: int, force: bool) -> Mapping[str, Any]:
        """Publish an earlier version again."""
        return await self._daemon.promote(version, force)

    async def rollback(self) -> Mapping[str, Any]:
        """Publish the parent of the live version."""
        return await self._daemon.rollback("asked for by an operator")


class DaemonService(OperationsService):
    """Implements `adaptd.server.service.Service` for one daemon.

    Raises:
      ConfigError: the target's tokenizer or configuration cannot be loaded.
    """

    def __init__(self, daemon: Daemon) -> None:
        super().__init__(daemon)
        config = daemon.config
        folder = load.resolve(config.target.model, "target")
        self._generator = daemon
        self._tokenizer = load.load_tokenizer(folder)
        context, vocabulary = load.model_limits(folder)
        self._limits = Limits(min(config.engine.max_length, context), vocabulary)

    def models(self) -> Sequence[str]:
        """The one model name of the configuration."""
        return [self._daemon.config.server.model]

    def limits(self) -> Limits:
        """Context and vocabulary."""
        return self._limits

    def encode(self, text: str) -> Sequence[int]:
        """Token ids of a plain prompt."""
        ids: list[int] = self._tokenizer(text)["input_ids"]
        return ids

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None
    ) -> Sequence[int]:
        """Token ids of a conversation."""
        return render_chat(self._tokenizer, messages, tools)

    async def generate(self, request: CompletionInput) -> AsyncGenerator[Chunk, None]:
        """Chunks of one sequence; closing it early aborts the sequence in its decoder."""
        decode = DecodeRequest(
            request_id=request.request_id,
            prompt_ids=request.prompt_ids,
            params=SamplingParams(
                temperature=request.temperature,
                top_p=request.top_p,
                top_k=request.top_k,
                max_tokens=request.max_tokens,
                seed=request.seed,
                stop=request.stop,
                ignore_eos=request.ignore_eos,
            ),
            domain=request.domain or "default",
            tenant=request.tenant or "",
            store=request.store,
        )
        async with aclosing(self._generator.generate(decode, request.stream)) as deltas:
            async for delta in deltas:
                yield _chunk(delta, request)


def _chunk(delta: Delta, request: CompletionInput) -> Chunk:
    done = delta.finished
    if done is None:
        return Chunk(delta.text, len(delta.token_ids))
    if done.finish_reason == "abort":
        raise DecoderStopped("the sequence was aborted before it was complete; send it again")
    stats = done.stats
    text, tokens = (delta.text, len(delta.token_ids)) if request.stream else (done.text or "", len(done.token_ids))
    return Chunk(
        text,
        tokens,
        finish_reason=done.finish_reason,
        usage=Usage(len(request.prompt_ids), len(done.token_ids), done.cached_tokens),
        speculative=SpeculativeStats(stats.rounds, stats.proposed, stats.accepted, stats.draft_version_max),
    )
