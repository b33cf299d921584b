"""`adaptd doctor` for `engine.kind: vllm`: what this deployment expects of its server, against what the server is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

from adaptd.app.doctor import Check
from adaptd.config import Config
from adaptd.errors import ConfigError
from adaptd.models import load
from adaptd.models.chat import render_chat
from adaptd.models.fold import check_publishable
from adaptd.models.scope import ScopeConfig
from adaptd.sidecar.checks import Expected, run_checks


def vllm_checks(
    config: Config,
    url: str,
    *,
    headers: Mapping[str, str] | None = None,
    top_logprobs: int = 0,
    draft_sampling: Literal["greedy", "probabilistic"] = "greedy",
    allow_remote: bool = False,
) -> Iterator[Check]:
    """Checks of the server at `url`; see `adaptd.sidecar.checks.Expected` for the arguments. Reads only."""
    scope = ScopeConfig(**config.adapt.model_dump(), seed=config.seed)
    try:
        check_publishable(scope)
        yield Check("publishable scope", "ok", "versions fit a running engine")
    except ConfigError as error:
        yield Check("publishable scope", "failed", str(error), "change section adapt of the configuration")
    tokenize: Callable[[str], list[int]] | None = None
    render: Callable[[list[dict[str, str]]], list[int]] | None = None
    try:
        tokenizer: Any = load.load_tokenizer(load.resolve(config.target.model, "target"))
        tokenize, render = tokenizer.encode, lambda messages: render_chat(tokenizer, messages)
    except ConfigError:
        pass  # the models' own check says so
    expected = Expected(
        k=config.engine.k,
        top_logprobs=top_logprobs,
        draft_sampling=draft_sampling,
        scope=scope.to_dict(),
        allow_remote=allow_remote,
        tokenize=tokenize,
        render=render,
    )
    yield from (Check(*finding) for finding in run_checks(url, expected, headers))
