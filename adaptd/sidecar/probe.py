"""What the server can do, found out by asking it: capabilities are probed, version strings are only shown.

A few requests of one to eight tokens. The last of them is the most important: the same request plain and with the proxy's
additions, whose restored answer must look like the plain one, member by member. If it does not, nothing is ever added.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from typing import Any

import httpx

from adaptd.sidecar.answer import Seen, StreamRestorer, restore
from adaptd.sidecar.request import PATHS, Plan, plan
from adaptd.sidecar.steps import figures

_PROMPT = "The"
#: Two tokenizers that agree on this have one vocabulary for all that matters here.
_SPECIMEN = "The 3 quick brown foxes (über-schnell) jumped:\n\tfor i in range(10**6): x[i] = 'é' + \"日本語\" # 42.5%"
#: Depths to fall back to where the server's --max-logprobs is lower than what is wanted.
_DEPTHS = (20, 8, 5, 4, 2)
#: Nats by which two log-probabilities of one context may differ and still be the same.
_SAME = 0.02


@dataclass(frozen=True, slots=True)
class Capabilities:
    """Of one server, as it is now."""

    version: str = "unknown"
    models: tuple[str, ...] = ()
    """Names of the target; adapters of it are others."""
    target_id: str = ""
    k: int | None = None
    """Tokens that it drafts a step; None if it does not say."""
    top_logprobs: int = 0
    """Depth that may be asked for; 0 if answers cannot be captured."""
    usage_forced: bool = False
    per_step: bool = False
    vocabulary: str = ""
    """What its tokenizer makes of a fixed text, hashed; empty if it does not say."""
    reason: str = ""
    """Why answers cannot be captured, with the remedy; empty if they can."""


async def probe(client: httpx.AsyncClient, headers: dict[str, str], wanted: int) -> Capabilities:
    """Ask the server.

    Args:
      client: its base_url is the server.
      headers: of adaptd's own calls, with the API key where there is one.
      wanted: most likely tokens to ask for at each position.
    Raises:
      httpx.HTTPError: it cannot be reached or refuses adaptd's calls.
    """
    models, version = await _models(client, headers), await _version(client)
    names = tuple(m["id"] for m in models)
    identity = "\n".join(f"{m['id']} {m.get('root')}" for m in models)
    about: dict[str, Any] = {
        "version": version,
        "models": names,
        "target_id": hashlib.blake2b(identity.encode(), digest_size=8).hexdigest(),
    }
    ask = _Asker(client, headers, names[0] if names else "")
    plain = await ask.json("/v1/completions", max_tokens=8)
    found = figures((plain.get("metrics") or {}).get("speculative_decoding"))
    about |= {"k": found.k if found else None, "per_step": bool(found and found.steps)}
    about["usage_forced"] = '"usage":{' in await ask.text("/v1/completions", stream=True)
    about["vocabulary"] = await _vocabulary(client, headers, names[0] if names else "")
    depth = 0
    for depth in (wanted, *(d for d in _DEPTHS if d < wanted), 0):
        if depth == 0 or await ask.accepts("/v1/completions", logprobs=depth):
            break
    if not depth:
        return Capabilities(**about, reason="the server gives no log-probabilities: raise its --max-logprobs")
    if trouble := await _trouble_with_logprobs(ask, depth):
        return Capabilities(**about, reason=trouble)
    for path in PATHS:
        for stream in (False, True):
            if not await _restores(ask, path, stream, depth, usage=not about["usage_forced"]):
                return Capabilities(
                    **about, reason=f"answers of {path} cannot be put back as they were: this server is not known"
                )
    return Capabilities(**about, top_logprobs=depth)


async def _vocabulary(client: httpx.AsyncClient, headers: dict[str, str], model: str) -> str:
    try:
        answer = await client.post("/tokenize", json={"model": model, "prompt": _SPECIMEN}, headers=headers)
        answer.raise_for_status()
        ids = [int(token) for token in answer.json()["tokens"]]
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        return ""
    return hashlib.blake2b(" ".join(map(str, ids)).encode(), digest_size=8).hexdigest()


class _Asker:
    """Small requests, greedy, of one token unless told otherwise."""

    def __init__(self, client: httpx.AsyncClient, headers: dict[str, str], model: str) -> None:
        self._client, self._headers, self._model = client, headers, model

    def body(self, path: str, **options: Any) -> bytes:
        prompt = (
            {"messages": [{"role": "user", "content": _PROMPT}]} if "chat" in path else {"prompt": _PROMPT}
        )  # fmt: skip
        return json.dumps({"model": self._model, **prompt, "max_tokens": 1, "temperature": 0, **options}).encode()

    async def post(self, path: str, body: bytes) -> httpx.Response:
        headers = {**self._headers, "content-type": "application/json", "accept-encoding": "identity"}
        return await self._client.post(path, content=body, headers=headers)

    async def text(self, path: str, **options: Any) -> str:
        answer = await self.post(path, self.body(path, **options))
        answer.raise_for_status()
        return answer.text

    async def json(self, path: str, **options: Any) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(await self.text(path, **options))
        return found

    async def accepts(self, path: str, **options: Any) -> bool:
        return (await self.post(path, self.body(path, **options))).status_code == 200


async def _models(client: httpx.AsyncClient, headers: dict[str, str]) -> list[dict[str, Any]]:
    answer = await client.get("/v1/models", headers=headers)
    answer.raise_for_status()
    return [m for m in answer.json()["data"] if not m.get("parent")]


async def _version(client: httpx.AsyncClient) -> str:
    try:
        return str((await client.get("/version")).json()["version"])
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        return "unknown"


async def _trouble_with_logprobs(ask: _Asker, depth: int) -> str:
    """What is wrong with the server's log-probabilities, or nothing: they must be those of temperature 1."""
    found = []
    for temperature in (1.0, 0.5):
        answer = await ask.json("/v1/completions", logprobs=depth, temperature=temperature, top_k=-1, top_p=1.0, seed=0)
        top = answer["choices"][0]["logprobs"]["top_logprobs"][0]
        found.append(sorted(top.values(), reverse=True)[: depth - 1 or 1])
    one, half = found
    if any(value > _SAME for value in one) or sum(map(math.exp, one)) > 1 + _SAME:
        return "the server returns logits: start it with --logprobs-mode raw_logprobs"
    if any(abs(a - b) > _SAME for a, b in zip(one, half, strict=False)):
        return "the server's log-probabilities follow the temperature: start it with --logprobs-mode raw_logprobs"
    return ""


async def _restores(ask: _Asker, path: str, stream: bool, depth: int, *, usage: bool) -> bool:
    body = ask.body(path, stream=stream)
    planned = plan(path, body, top_logprobs=depth, capture=None, ask_usage=usage)
    if planned is None:
        return False
    plain, added = await ask.post(path, body), await ask.post(path, planned.body)
    if plain.status_code != 200 or added.status_code != 200:
        # A model without a chat template answers 400 to both: nothing to restore, and such requests are sent again plain.
        return plain.status_code == added.status_code
    restored, seen = _restored(added.content, planned)
    return _shapes(plain.text, stream) == _shapes(restored, stream) and _complete(seen)


def _restored(data: bytes, planned: Plan) -> tuple[str, Seen]:
    if not planned.stream:
        restored, seen = restore(data, planned)
        return restored.decode(), seen
    restorer = StreamRestorer(planned)
    return (restorer.feed(data) + restorer.close()).decode(), restorer.seen


def _complete(seen: Seen) -> bool:
    choice = seen.choices.get(0)
    return choice is not None and len(choice.token_ids) == 1 and bool(choice.logprobs)


def _shapes(text: str, stream: bool) -> list[Any]:
    if not stream:
        return [_shape(json.loads(text))]
    events = [e.removeprefix("data: ") for e in text.split("\n\n")]
    return [_shape(json.loads(e)) if e.startswith("{") else e for e in events]


def _shape(value: Any) -> Any:
    """Keys in order and types of values; what a number or text is, is another request's business."""
    if isinstance(value, dict):
        return [(key, _shape(inner)) for key, inner in value.items()]
    if isinstance(value, list):
        return [_shape(inner) for inner in value]
    return value if value is None or isinstance(value, bool) else float if isinstance(value, int) else type(value)
