"""Configuration: frozen sections with defaults that run the pocket pair, a YAML file, the environment, `--set`.

Precedence, weakest first: defaults, `--config FILE`, `ADAPTD_SECTION__KEY` in the environment, `--set section.key=value`.
An unknown key is an error that names the nearest one. Nothing writes into a configuration after it is made.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from adaptd.errors import ConfigError
from adaptd.sections import EngineConfig, LogConfig, RayConfig, TrendsConfig, UpstreamConfig
from adaptd.sections import Section as _Section
from adaptd.values import put, read_mapping, value_of


class ModelConfig(_Section):
    """A model: a Hugging Face directory or name."""

    model: str = "pocket"
    """Path or name; `pocket`: the shipped family, `pocket-math`: its target tuned on math; a peft adapter is merged."""


class AdaptConfig(_Section):
    """What of the draft may change."""

    scope: Literal["private_expert", "lora", "full"] = "private_expert"
    """`full` is the baseline of the benchmarks, not for production."""
    width: int = Field(128, ge=1)
    """Width of the private expert's bottleneck."""
    gated: bool = True
    """Learned gates of the private expert and the head's correction; without them both fold into a plain model."""
    request_gate: bool | None = None
    """A learned gate by prompt over everything learned; none given: where gated and scope is private_expert."""
    lora_rank: int | None = Field(None, ge=0)
    """Rank of LoRA, which has no gate; 0 for none (private_expert only); none given: 16."""
    lora_alpha: float = Field(32.0, gt=0)
    """LoRA's delta is (lora_alpha / lora_rank) B A."""
    lora_targets: tuple[str, ...] | None = None
    """Layers by name; none given: attention for private_expert, every linear layer for lora."""
    head_rank: int | None = Field(None, ge=0)
    """Rank of the output head's correction; 0 for none; none given: 24 for private_expert, 0 for lora."""
    embed_rank: int | None = Field(None, ge=0)
    """Rank of the input embedding's correction; 0 for none; none given: 24 for private_expert, 0 for lora."""
    head_bias: bool = True
    """A learned bias in the output head's correction."""


class LearnConfig(_Section):
    """The learner."""

    enabled: bool = True
    """False serves and captures with the current draft and never learns."""
    objective: Literal[
        "forward_kl", "reverse_kl", "jsd", "tv", "kl_tv", "cross_entropy", "entropy_adaptive", "acceptance_length"
    ] = "kl_tv"
    """Divergence between target and draft, minimised at every captured position, or minus the acceptance length there."""
    rejection_weight: float = Field(1.0, gt=0)
    """Weight of corrections in the loss, against 1 for every other position."""
    branch_weight: float = Field(1.0, ge=0)
    """Weight there of each position beside the answer (`capture.k_branch`, `capture.alternatives`); 0 leaves them out."""
    branch_share: float = Field(0.5, gt=0, le=1)
    """Share of what stands beside an answer that a step reads; other parts of it in the next."""
    optimizer: Literal["muon", "adamw"] = "muon"
    """`muon`: Muon on the matrices of private expert and LoRA, AdamW on everything else; `adamw`: AdamW on all."""
    lr: float = Field(3e-3, gt=0)
    """Peak learning rate."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay."""
    warmup_steps: int = Field(10, ge=0)
    """Steps over which the learning rate rises from zero."""
    clip: float = Field(1.0, gt=0)
    """Largest gradient norm."""
    average_decay: float = Field(0.985, ge=0, lt=1)
    """Decay a step, at most, of the moving average of weights that is judged and published; 0 for none."""
    keep_anchors: bool = True
    """On anchors follow the better of published and day-0 draft, not the target: learning without forgetting."""
    batch_traces: int = Field(8, ge=1)
    """Traces a step."""
    steps_per_tick: int = Field(56, ge=1)
    """Optimiser steps between two gate decisions, at most: a tick that gained nothing halves the next one's, to a quarter."""
    min_new_traces: int = Field(32, ge=1)
    """New traces that make a tick due."""
    interval_s: float = Field(60.0, gt=0)
    """Seconds after which a tick is due with fewer new traces."""
    poll_s: float = Field(0.5, gt=0)
    """Seconds between two looks at the triggers."""
    lam: float = Field(2.0, ge=0)
    """Share of SurpriseRatio-selected traces to one share of fresh ones."""
    epsilon: float = Field(0.33, ge=0)
    """Share of anchor traces to one share of fresh ones."""
    mix_after: int = Field(4, ge=0)
    """Steps on fresh traces alone after a drift event or a start, before the mixture."""
    priority: Literal["surprise", "agreement", "uniform", "loss", "entropy", "overlap"] = "surprise"
    """What a learned-from trace is replayed by: low or high (`agreement`) SurpriseRatio; mean loss, entropy, 1 - overlap."""
    priority_exponent: float = Field(0.7, ge=0)
    """0: uniform; 1: proportional to priority."""
    use_exponent: float = Field(2.0, ge=0)
    """Replayed in proportion to (1 + times learned from)^-use_exponent as well, the new ones first; 0: however often."""
    importance_exponent: float = Field(0.0, ge=0, le=1)
    """Correction of the sampling bias; 1: full."""
    tau: float = Field(1.0, gt=0)
    """Threshold of the SurpriseRatio."""
    max_refusals: int = Field(6, ge=1)
    """Refusals in a row after which learning restarts from the published version."""
    max_tokens: int = Field(384, ge=16)
    """Longest trace in a training batch, in tokens, cut on the left, and the most tokens of what stands behind its rejections."""
    prompt_gradient: bool = False
    """Also learn through what the prompt's tokens leave behind for the answer's: dearer, and no better."""
    threads: int = Field(1, ge=1)
    """CPU threads of the learner."""
    duty_cycle: float = Field(1.0, gt=0, le=1)
    """Share of a tick in which the learner works, resting after each step; for a GPU that it shares with decoders."""
    niceness: int = Field(10, ge=0, le=19)
    """Processor priority that learner and publisher give up, 0 (none) to 19; decoders keep theirs."""


class CaptureConfig(_Section):
    """What decoders keep of a verification."""

    positions: Literal["all", "rejected"] = "all"
    """Every response position, or corrections only."""
    k_top: int = Field(32, ge=1, le=256)
    """Most likely target tokens kept at each position."""
    k_tail: int = Field(8, ge=0, le=64)
    """Tokens drawn from the target's others beside `k_top` (and an equal `k_branch`), by which its tail is learned; 0: none."""
    k_draft: int = Field(8, ge=1, le=64)
    """Most likely draft tokens kept at a correction."""
    k_branch: int = Field(32, ge=0, le=256)
    """Most likely target tokens kept behind each rejected proposal and those after it, with `positions: all`; 0: none."""
    max_tokens: int = Field(2048, ge=16)
    """Longest trace, in tokens, cut on the left."""
    reserved_share: float = Field(0.15, ge=0, le=0.5)
    """Share of requests kept for the gate and never trained on."""
    alternatives: int = Field(3, ge=0, le=16)
    """Other tokens at each position behind which idle decoders ask the target, `k_branch` tokens each, to learn from."""
    again: int = Field(0, ge=0, le=16)
    """Further answers that idle decoders give to each prompt, to learn from; not to greedy or reserved ones."""
    max_pending: int = Field(1024, ge=1)
    """Traces waiting for the buffer; one more drops the oldest."""

    @property
    def asked(self) -> int:
        """`alternatives`, where anything beside the answer is kept; else 0."""
        return self.alternatives if self.k_branch and self.positions == "all" else 0


class BufferConfig(_Section):
    """The replay buffer."""

    url: str = "embedded"
    """`embedded`, or a Redis URL (`redis://`, `rediss://`, `unix://`)."""
    max_bytes: int = Field(256 * 2**20, ge=2**16)
    """Budget of recent and anchor traces, in encoded bytes."""
    reserved_max_bytes: int = Field(32 * 2**20, ge=2**16)
    """Budget of the reserved traces, in encoded bytes."""
    ttl_s: float = Field(7 * 86400.0, gt=0)
    """Age at which a recent trace is dropped, in seconds."""
    anchors: int = Field(1024, ge=1)
    """Traces in the uniform reservoir."""


class GateConfig(_Section):
    """What a candidate must show."""

    min_gain: float = 0.002
    """Promote only if the lower bound of the relative MAL gain is above this; at 0 one in forty that is no better passes."""
    max_regression: float = Field(0.02, ge=0)
    """No domain may lose more than this, relative."""
    exchange: float = Field(0.3, ge=0)
    """A domain may lose more, up to this share of what is surely gained, but not below the day-0 draft."""
    gone_loss: float = Field(0.15, ge=0)
    """How far below the day-0 draft a domain may fall that is not asked any more; it has to be won back when it is."""
    min_traces: int = Field(8, ge=2)
    """Reserved traces below which nothing is decided."""
    max_traces: int = Field(64, ge=2)
    """Newest reserved traces, and anchors, that a decision reads."""
    resamples: int = Field(1000, ge=100)
    """Bootstrap resamples."""
    level: float = Field(0.95, gt=0.5, lt=1)
    """Confidence of the intervals."""
    watch: bool = True
    """Watch live acceptance after a promotion and roll back by itself."""
    max_drop: float = Field(0.1, ge=0, lt=1)
    """Relative fall of live acceptance that the watch still takes for noise of its baseline."""
    watch_requests: int = Field(400, ge=1)
    """Requests after which a watch ends, decided or not: a version whose mean is below by then goes back too."""


class DriftConfig(_Section):
    """Drift detection: ADWIN on acceptance, per domain."""

    delta: float = Field(0.5, gt=0, lt=1)
    """Significance of a cut."""


class RecallConfig(_Section):
    """What the target said before, mixed into the draft's proposals."""

    enabled: bool = True
    """Each decoder keeps the distributions that it served, by context, and proposes from them too."""
    orders: tuple[Annotated[int, Field(ge=1, le=16)], ...] = (1, 2, 3, 4)
    """Lengths of the contexts, in tokens."""
    echo: tuple[Annotated[int, Field(ge=1, le=16)], ...] = (2, 3)
    """Lengths of the contexts that are looked up in the request's own text; none: no prompt lookup."""
    entries: int = Field(2**18, ge=4)
    """Contexts kept by a decoder, over all orders."""
    width: int = Field(32, ge=1, le=256)
    """Most likely tokens kept of each distribution."""

    seeded: bool = False
    """Also for sampled requests with a seed: they then repeat only while what is remembered is the same."""

    @model_validator(mode="after")
    def _has_a_source(self) -> RecallConfig:
        if self.enabled and not self.orders and not self.echo:
            raise ValueError(
                "orders and echo are both empty: give one of them a length, or set recall.enabled to false"
            )
        return self


class CheckpointsConfig(_Section):
    """The checkpoint store."""

    keep: int = Field(20, ge=2)
    """Newest versions kept on disk."""
    poll_s: float = Field(0.5, gt=0)
    """Seconds between two looks of a decoder at CURRENT."""


class ServerConfig(_Section):
    """The HTTP server."""

    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = Field(8321, ge=0, le=65535)
    """Port; 0 takes a free one."""
    model: str = "adaptd"
    """Model name that clients send."""
    admin_token: SecretStr | None = None
    """Bearer token of the administrative routes; without one they are refused."""
    admin_remote: bool = False
    """Answer administrative routes to other machines too."""
    drain_s: float = Field(20.0, ge=0)
    """Seconds that requests in flight get after SIGTERM."""


class Config(BaseSettings):
    """The whole configuration."""

    model_config = SettingsConfigDict(
        env_prefix="ADAPTD_", env_nested_delimiter="__", extra="forbid", frozen=True, use_attribute_docstrings=True
    )

    deployment: str = Field("default", pattern=r"^[a-z0-9][a-z0-9_-]*$")
    """Name of the deployment: the prefix of its Redis keys and its folder."""
    state_dir: Path = Path("~/.local/state/adaptd")
    """Where checkpoints, the learner's state and the embedded buffer live."""
    seed: int = 0
    """Seed of the learner's choices."""
    engine: EngineConfig = EngineConfig()
    upstream: UpstreamConfig = UpstreamConfig()
    target: ModelConfig = ModelConfig()
    draft: ModelConfig = ModelConfig()
    adapt: AdaptConfig = AdaptConfig()
    learn: LearnConfig = LearnConfig()
    capture: CaptureConfig = CaptureConfig()
    buffer: BufferConfig = BufferConfig()
    gate: GateConfig = GateConfig()
    drift: DriftConfig = DriftConfig()
    recall: RecallConfig = RecallConfig()
    checkpoints: CheckpointsConfig = CheckpointsConfig()
    trends: TrendsConfig = TrendsConfig()
    server: ServerConfig = ServerConfig()
    ray: RayConfig = RayConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="after")
    def _has_idle_decoders(self) -> Config:
        if self.capture.again and self.engine.kind == "vllm":
            raise ValueError(
                f"capture.again ({self.capture.again}) is for decoders of adaptd's own, and engine.kind is 'vllm': set it to 0"
            )
        return self

    @model_validator(mode="after")
    def _has_blocks(self) -> Config:
        if self.learn.objective == "acceptance_length" and self.capture.positions != "all":
            raise ValueError(
                f"learn.objective: acceptance_length needs every position of a block, and capture.positions is "
                f"{self.capture.positions!r}: set it to 'all', or take another objective, e.g. 'tv'"
            )
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what `load` passes: it merges file, environment and `--set` itself, so that every key is checked alike."""
        return (init_settings,)

    @property
    def home(self) -> Path:
        """Folder of this deployment under `state_dir`, with `~` resolved."""
        return self.state_dir.expanduser() / self.deployment


def load(path: Path | None = None, sets: Sequence[str] = (), environ: dict[str, str] | None = None) -> Config:
    """Read the configuration.

    Args:
      path: YAML file, or None for the defaults.
      sets: `section.key=value` strings; the value is read as YAML.
      environ: environment to read `ADAPTD_*` from; None for none.

    Raises:
      ConfigError: the file is missing or not a mapping, or a key or value is refused; the message names key, value, rule.
    """
    values: dict[str, Any] = {}
    if path is not None:
        values = read_mapping(path)
    for name, text in (environ or {}).items():
        if name.startswith("ADAPTD_") and "__" in name:
            put(values, name.removeprefix("ADAPTD_").lower().split("__"), text, name)
        elif name in ("ADAPTD_DEPLOYMENT", "ADAPTD_STATE_DIR", "ADAPTD_SEED"):
            values[name.removeprefix("ADAPTD_").lower()] = value_of(text)
    for item in sets:
        key, equals, text = item.partition("=")
        if not equals:
            raise ConfigError(f"--set {item!r} must have the form section.key=value")
        put(values, key.strip().split("."), text, f"--set {key.strip()}")
    return checked(values)


def checked(values: Mapping[str, Any]) -> Config:
    """The configuration of these values, by section.

    Raises:
      ConfigError: a key or value is refused; the message names key, value, rule.
    """
    try:
        return Config(**values)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(detail) for detail in error.errors())) from None


def settings() -> Iterator[tuple[str, str, str]]:
    """Every setting as (dotted key, default, description), in order: the table of the README."""
    for name, field in Config.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, _Section):
            for key, inner in section.model_fields.items():
                yield f"{name}.{key}", str(inner.default), inner.description or ""
        else:
            yield name, str(field.default), field.description or ""


def _explain(detail: Any) -> str:
    dotted = ".".join(str(part) for part in detail["loc"])
    if not dotted:  # a rule between sections names its keys itself
        return str(detail["msg"])
    if detail["type"] == "extra_forbidden":
        known = [key for key, _, _ in settings()] + list(Config.model_fields)
        near = difflib.get_close_matches(dotted, known, n=1, cutoff=0.0)
        return f"unknown configuration key {dotted!r}; the nearest is {near[0]!r}"
    return f"configuration key {dotted!r} = {detail['input']!r}: {detail['msg']}"
