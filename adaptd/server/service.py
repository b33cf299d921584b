"""What the HTTP layer needs from the daemon behind it. The routes know this protocol and nothing else.

Refusals are raised as `adaptd.errors.RequestRefused` (or `checkpoints.errors.CheckpointError` by the administrative
actions) and become OpenAI error bodies; anything else is a bug and becomes a 500 without details.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from adaptd.report.split import Baseline

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Limits:
    """What the loaded models can take."""

    context_length: int
    """Tokens of prompt and answer together."""
    vocabulary_size: int
    """Token ids are below this."""


@dataclass(frozen=True, slots=True)
class CompletionInput:
    """One sequence to generate. A request for n choices of m prompts becomes n * m of these."""

    request_id: str
    """Unique, made by the server; seeds the choice of reserved traces."""
    client_request_id: str
    """The client's x-request-id, or the one made for it: for logs, may repeat."""
    model: str
    prompt_ids: tuple[int, ...]
    """At least one, each below `Limits.vocabulary_size`, fewer than `Limits.context_length`."""
    max_tokens: int
    """At least 1; prompt and answer fit the context."""
    temperature: float
    """0 is greedy."""
    top_p: float
    top_k: int
    """0 is off."""
    seed: int | None
    """None: any. Choice i of a seeded request has seed + i."""
    stop: tuple[str, ...]
    """The answer ends before the first of these; the service never emits any part of one."""
    ignore_eos: bool
    domain: str | None
    tenant: str | None
    store: bool
    """False: the sequence must not reach the replay buffer (x-adaptd-no-store)."""
    stream: bool
    """Whether the client wants pieces as they come; if not, a single chunk will do."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one sequence."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    """Prompt tokens that had been read for another request."""


@dataclass(frozen=True, slots=True)
class SpeculativeStats:
    """How speculative decoding went for one sequence."""

    rounds: int
    proposed: int
    accepted: int
    draft_version: int
    """The version at the last round; 0 is the base draft."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of an answer. Exactly the last one has `finish_reason`, `usage` and `speculative`."""

    text: str
    """Whole characters only: bytes of an unfinished one wait for the next chunk. May be empty."""
    tokens: int
    """How many tokens this chunk stands for."""
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    speculative: SpeculativeStats | None = None


class Operations(Protocol):
    """A daemon but for generation. Calls come from one event loop; the synchronous ones must be quick."""

    def ready(self) -> tuple[bool, str]:
        """Whether requests can be served now, and the state in a word: ready, loading, draining."""
        ...

    async def status(self, since: str | None) -> Mapping[str, Any]:
        """The report that `adaptd status` prints, as plain JSON; `since` (such as 1h) bounds its history.

        The dashboard reads these keys and shows a dash for any that is absent::

            {"adaptd_version": str, "deployment": str, "engine": str, "k": int, "uptime_s": float, "in_flight": int,
             "draining": bool, "draft": {"version": int, "age_s": float | None, "scope": str},
             "acceptance": {window: metrics, "drift": {"events": [{"domain", "at", "direction", "before", "after"}]},
                            "domains": {name: {window: metrics, "sparkline": [mal, oldest first]}}},
             "buffer": {"available": bool, "error": str, "sizes": {stratum: traces}, "bytes": {stratum: bytes},
                        "stored_bytes": int, "max_bytes": int, "inserted_total", "evicted_total", "refused_total": {...}},
             "decoders": [{"draft_version": int, "swap": {"swaps", "refusals", "max_pause_s"},
                           "writer": {"written", "dropped"}}],
             "learner": {"steps", "ticks", "last_loss", "promoted", "rejected", "restarts", "skipped_steps",
                         "history": [{"at", "reason", "loss", "published", "verdict": {"reason", "gain", "on_base"}}]} | None,
             "watch": `adaptd.app.watching.Watching.status`, "economics": `adaptd.report.economics`,
             "events": [{"at": Unix seconds, "kind": str, ...}, newest last],
             "upstream", "publisher", "proxy": of a daemon in front of servers (`adaptd.app.sidecar`),
             "trends": with `since`, what was seen in that time: {"from", "to", "step_s", "at": [Unix seconds],
                       "domains": {name: {"requests", "mal", "token_acceptance": [x or None]}}, "events": [...]}}

        where a window is `now`, `1h` or `24h` and metrics are {"requests": int, "mal": x, "token_acceptance": x,
        "block_acceptance": x, "by_depth": [x]}.
        """
        ...

    async def report(self, since: str, baseline: Baseline, traces: int) -> Mapping[str, Any]:
        """What `adaptd report` draws of the period since then, as plain JSON; single tokens of answers are in it.

        Args:
          baseline: what the end of the period is compared with. traces: read of each stratum of the replay buffer.
        """
        ...

    def metrics(self) -> bytes:
        """Prometheus text exposition, format 0.0.4."""
        ...

    async def checkpoints_list(self) -> Sequence[Mapping[str, Any]]:
        """Published versions, oldest first, as plain JSON."""
        ...

    async def promote(self, version: int, force: bool) -> Mapping[str, Any]:
        """Publish an earlier version's tensors as a new version; gives that version as plain JSON.

        `force` lifts a quarantine first.

        Raises:
            CheckpointError: it does not exist or is damaged. VersionQuarantined: live traffic refused it.
        """
        ...

    async def rollback(self) -> Mapping[str, Any]:
        """Publish the parent of the version that serves as a new version; gives that version as plain JSON.

        Raises:
            CheckpointError: there is nothing to roll back to.
        """
        ...


class Service(Operations, Protocol):
    """A daemon that generates, as the HTTP layer sees it. Calls come from one event loop."""

    def models(self) -> Sequence[str]:
        """Names that requests may use; the first is meant where a request names none."""
        ...

    def limits(self) -> Limits:
        """Limits of the models that are loaded."""
        ...

    def encode(self, text: str) -> Sequence[int]:
        """Token ids of a plain prompt, with whatever special tokens the tokenizer puts in front."""
        ...

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None
    ) -> Sequence[int]:
        """Token ids of the conversation under the target's chat template, ready for the assistant's answer.

        Messages have `role`, `content` (a string or None) and, where sent, `name`, `tool_calls`, `tool_call_id`.

        Raises:
            RequestRefused: there is no template, or it does not take this conversation.
        """
        ...

    def generate(self, request: CompletionInput) -> AsyncGenerator[Chunk, None]:
        """Generate one sequence: an async generator whose last chunk has a finish reason.

        Closing it early (`aclose`, or cancellation while it waits) aborts the sequence in the decoder.

        Raises:
            Overloaded, DecoderStopped: on the first or any later step.
        """
        ...
