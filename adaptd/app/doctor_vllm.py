"""`adaptd doctor` for `engine.kind: vllm`: what this deployment expects of its server, against what the server is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from adaptd.app.check import Check
from adaptd.app.publication import why_not
from adaptd.config import Config
from adaptd.errors import ConfigError
from adaptd.models import load
from adaptd.models.chat import render_chat
from adaptd.models.scope import ScopeConfig
from adaptd.sidecar.able import NEEDED
from adaptd.sidecar.checks import Expected, run_checks

#: Findings that matter only to who publishes: warnings where the configuration leaves publishing open.
_OF_PUBLISHING = NEEDED | {"address"}


def vllm_checks(config: Config) -> Iterator[Check]:
    """Checks of every server of section `upstream`. Reads only."""
    servers = config.upstream.servers
    for number, upstream in enumerate(servers, 1):
        for check in _of_one(config.model_copy(update={"upstream": upstream})):
            yield check if len(servers) == 1 else check._replace(name=f"server {number}: {check.name}")


def _of_one(config: Config) -> Iterator[Check]:
    """Checks of the server at `upstream.url`."""
    upstream = config.upstream
    never, state = "", "ok"
    try:
        never = why_not(config)
        state = "warning" if never and upstream.publish is None else "ok"
    except ConfigError as error:
        never, state = str(error), "failed"
    remedy = "change the settings that it names; upstream.publish: false says that versions shall stay in the store"
    found = never or "new versions are brought into the server"
    yield Check("publishing", state, found, "" if state == "ok" else remedy)  # type: ignore[arg-type]
    tokenize: Callable[[str], list[int]] | None = None
    render: Callable[[list[dict[str, str]]], list[int]] | None = None
    try:
        tokenizer: Any = load.load_tokenizer(load.resolve(config.target.model, "target"))
        tokenize, render = tokenizer.encode, lambda messages: render_chat(tokenizer, messages)
    except ConfigError:
        pass  # the models' own check says so
    scope = ScopeConfig(**config.adapt.model_dump(), seed=config.seed)
    expected = Expected(
        k=config.engine.k,
        top_logprobs=upstream.top_logprobs,
        draft_sampling=upstream.draft_sampling,
        scope=None if never else scope.to_dict(),
        allow_remote=upstream.publish_remote,
        tokenize=tokenize,
        render=render,
    )
    key = upstream.api_key
    headers = {"authorization": f"Bearer {key.get_secret_value()}"} if key else {}
    for finding in run_checks(upstream.url, expected, headers):
        check = Check(*finding)
        demoted = not upstream.publish and check.state == "failed" and check.name in _OF_PUBLISHING
        yield check._replace(state="warning") if demoted else check
