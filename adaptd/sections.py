"""The base of every section of the configuration, and the sections of engine, server behind the proxy, trends, Ray, logging."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator


class Section(BaseModel):
    """Frozen; an unknown key is an error; the text under a field is its description."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


_ADDRESS = r"^(https?://[^/\s]+(/\S*)?|unix:///\S+)$"
Rate = Annotated[float, Field(gt=0)]


class EngineConfig(Section):
    """The decoders."""

    kind: Literal["native", "vllm"] = "native"
    """Who decodes: `native`, adaptd's own Ray decoder actors; `vllm`, the server of section `upstream`."""
    decoders: int = Field(1, ge=1)
    """Decoder actors."""
    k: int = Field(4, ge=1, le=16)
    """Tokens the draft proposes a round; with `draft_length: auto`, at most."""
    draft_length: Literal["fixed", "auto"] = "fixed"
    """`fixed`: always `k`; `auto`: 0 to `k`, whatever is fastest by domain, from measured acceptance and times (native)."""
    max_batch: int = Field(8, ge=1)
    """Requests decoded together by one decoder."""
    max_length: int = Field(512, ge=16)
    """Longest prompt and answer together, in tokens; bounded by the models' context."""
    prefill_tokens: int = Field(1024, ge=1)
    """Most prompt tokens read between two rounds (chunked prefill); fewer while others are being answered."""
    prefix_caching: bool = True
    """What a prompt has in common with one before it, such as a system prompt, is not read again by the target."""
    max_queue: int = Field(64, ge=1)
    """Requests that may wait at one decoder; one more is answered 503."""
    device: str = "auto"
    """`auto` (CUDA where there is one), `cpu`, `cuda` or `cuda:N`."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """`auto`: bfloat16 on CUDA, float32 on CPU."""
    threads: int = Field(1, ge=1)
    """CPU threads of one decoder."""
    compiled: bool = True
    """CPU: run a round's passes in code that this machine's C++ compiler builds once, at the first start (some 20 seconds)."""
    cuda_graphs: bool = True
    """Capture a round as two CUDA graphs, the draft's passes and the target's, of a few shapes; no meaning on a CPU."""
    calibrate: bool = True
    """Time the models' passes at start, at each new size of batch and every 10 minutes: about three rounds each."""

    @model_validator(mode="after")
    def _chooses_for_itself(self) -> EngineConfig:
        if self.kind == "vllm" and self.draft_length == "auto":
            raise ValueError(
                "draft_length ('auto') is the native engine's: a vLLM server drafts what it was started with; "
                "leave it at 'fixed'"
            )
        return self


class UpstreamConfig(Section):
    """The vLLM server behind the proxy (`engine.kind: vllm`)."""

    url: str = Field("http://127.0.0.1:8000", pattern=_ADDRESS)
    """Address of the server: `http://`, `https://`, or `unix:///path/to/socket`."""
    urls: tuple[Annotated[str, Field(pattern=_ADDRESS)], ...] = ()
    """Addresses of several servers of one target, in the place of `url`; the first that is up takes new drafts first."""
    api_key: SecretStr | None = None
    """Bearer token of adaptd's own calls; a client's request goes on with the token that it came with."""
    connect_timeout_s: float = Field(5.0, gt=0)
    """Seconds to wait for a connection to the server."""
    read_timeout_s: float | None = Field(None, gt=0)
    """Seconds without a byte from the server after which a request is given up; none: never."""
    wait_s: float = Field(30.0, ge=0)
    """Seconds that the start waits for the server; after them it goes on and looks every `poll_s`."""
    poll_s: float = Field(2.0, gt=0)
    """Seconds between two looks at the server's health."""
    top_logprobs: int = Field(8, ge=1, le=256)
    """Most likely target tokens asked for at each position; bounded by the server's --max-logprobs."""
    capture_share: float = Field(1.0, ge=0, le=1)
    """Largest share of requests that are captured; the acceptance of the others is counted, their tokens are not asked for."""
    capture_budget: float = Field(0.02, ge=0, le=1)
    """Part of the server's speed that capture may cost, as measured: at high load fewer are captured; 1: whatever it costs."""
    draft_sampling: Literal["greedy", "probabilistic"] = "greedy"
    """The server's draft_sample_method: it decides what acceptance means, so learner and gate follow it."""
    plain_tokens_per_s: Rate | Annotated[dict[int, Rate], Field(min_length=1)] | None = None
    """Tokens a second of one request without speculation, or several by requests in flight (`{1: 40, 16: 22}`)."""
    temperature: float = Field(1.0, ge=0)
    """Temperature of requests that name none: the model's generation_config, else 1."""
    publish: bool | None = None
    """Bring new versions into the server; none given: where scope, address and server allow it, else status says why not."""
    publish_remote: bool = False
    """Publish also to a server that other machines can reach: its development routes, which replace weights, have no key."""
    server_folder: str | None = None
    """Folder of the update files (`STATE_DIR/DEPLOYMENT/updates`) as the server sees it; none given: as adaptd does."""
    development_routes: bool = False
    """Pass vLLM's development routes (/pause, /update_weights, /collective_rpc, ...), which no API key guards."""

    @model_validator(mode="after")
    def _names_each_once(self) -> UpstreamConfig:
        if len(set(self.urls)) != len(self.urls):
            raise ValueError(f"urls ({', '.join(self.urls)}) must name each server once")
        return self

    @property
    def servers(self) -> tuple[UpstreamConfig, ...]:
        """This section once for each server, with its `url`."""
        return tuple(self.model_copy(update={"url": url, "urls": ()}) for url in self.urls or (self.url,))


class TrendsConfig(Section):
    """The time series behind `adaptd status --since` and `adaptd report`."""

    enabled: bool = True
    """Keep it, in the replay buffer's Redis."""
    every_s: float = Field(60.0, ge=1)
    """Seconds between two writes."""
    domains: int = Field(32, ge=1, le=256)
    """Domains told apart; any further one is counted as `other`."""
    traces: int = Field(128, ge=0)
    """Newest traces counted by target entropy and token group at each write; 0: none."""
    groups: dict[str, str] = Field({}, max_length=3)
    """Token groups of your own (at most 3), or other rules of the built-in ones: a regular expression of the whole token."""

    @field_validator("groups")
    @classmethod
    def _are_expressions(cls, groups: dict[str, str]) -> dict[str, str]:
        for name, pattern in groups.items():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"groups.{name} ({pattern!r}) is no regular expression: {error}") from None
        return groups


class RayConfig(Section):
    """The Ray cluster."""

    address: str = "local"
    """`local` starts a private cluster; else the address of an existing one (`auto`, `ray://...`)."""
    decoder_cpus: float = Field(0.5, ge=0)
    """CPU share reserved by one decoder."""
    decoder_gpus: float = Field(0.0, ge=0)
    """GPU share reserved by one decoder."""
    learner_cpus: float = Field(0.5, ge=0)
    """CPU share reserved by the learner."""
    learner_gpus: float = Field(0.0, ge=0)
    """GPU share reserved by the learner."""
    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """Strategy of the placement group of decoders and learner."""


class LogConfig(Section):
    """Logging."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe level written."""
    style: Literal["auto", "json", "console"] = "auto"
    """`auto`: console on a terminal, JSON otherwise."""
