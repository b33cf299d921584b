"""`adaptd eval`: decode a prompts file with one draft version and report acceptance. No Ray, no Redis, no server."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from rich.progress import track

from adaptd.actors.parts import Pair, load_pair
from adaptd.actors.threads import set_threads
from adaptd.config import Config
from adaptd.decoding.build import build_engine
from adaptd.decoding.engine import SpeculativeDecoder
from adaptd.decoding.request import DecodeRequest, Finished, SamplingParams
from adaptd.errors import AdaptdError
from adaptd.models.chat import render_chat
from adaptd.report.monitor import Finished as Record
from adaptd.report.monitor import FloatArray, record_sums, summarise
from checkpoints.errors import CheckpointError
from checkpoints.store import CheckpointStore
from checkpoints.swap import check, copy_in_place


def read_prompts(path: Path, limit: int | None = None) -> list[tuple[str, str]]:
    """(domain, prompt) rows of a JSON Lines file, plain or gzip.

    Raises:
      AdaptdError: the file cannot be read, or a line is not an object with a non-empty string `prompt`; names the line.
    """
    rows: list[tuple[str, str]] = []
    try:
        with _open(path) as lines:
            for number, line in enumerate(lines, start=1):
                if limit is not None and len(rows) == limit:
                    break
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"]:
                    raise AdaptdError(f"{path}, line {number}: must be an object with a non-empty string `prompt`")
                rows.append((str(row.get("domain") or "default"), row["prompt"]))
    except (OSError, EOFError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise AdaptdError(f"{path} cannot be read as JSON Lines: {error}") from error
    if not rows:
        raise AdaptdError(f"{path} holds no prompts")
    return rows


def _open(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8")


def apply_version(config: Config, pair: Pair, version: int | None) -> int:
    """Put a stored draft version into `pair.draft`; returns the version used, 0 for day 0.

    Raises:
      AdaptdError: the version is unknown, corrupt or made for another base draft, tokenizer or scope.
    """
    store = CheckpointStore(config.home / "checkpoints")
    wanted = (store.current() or 0) if version is None else version
    if wanted == 0:
        return 0
    try:
        manifest, tensors = store.load(wanted)
        if tensors:
            check(manifest, tensors, pair.draft.expected(), pair.identity.base_id, pair.identity.tokenizer_hash)
            copy_in_place(pair.draft.expected(), tensors)
            pair.draft.refresh()
    except CheckpointError as error:
        raise AdaptdError(f"draft version {wanted} cannot be used: {error}") from error
    return wanted


def run(
    config: Config, prompts: Path, *, version: int | None, limit: int | None, temperature: float, max_tokens: int
) -> dict[str, Any]:
    """Decode every prompt; the result in the form of design section 4 (`eval`)."""
    rows = read_prompts(prompts, limit)
    set_threads(max(config.engine.threads, os.cpu_count() or 1))
    pair = load_pair(config, config.ray.decoder_gpus)
    used = apply_version(config, pair, version)
    engine = build_engine(config, pair.target, pair.draft.model, pair.tokenizer, capture=False)
    requests = [
        DecodeRequest(
            request_id=str(i),
            prompt_ids=tuple(render_chat(pair.tokenizer, [{"role": "user", "content": prompt}])),
            params=SamplingParams(temperature=temperature, max_tokens=max_tokens, seed=config.seed + i),
            domain=domain,
            store=False,
        )
        for i, (domain, prompt) in enumerate(rows)
    ]
    fitting = [r for r in requests if len(r.prompt_ids) < engine.max_length]
    if not fitting:
        raise AdaptdError(f"no prompt of {prompts} fits the context of {engine.max_length} tokens (engine.max_length)")
    k = config.engine.k
    sums: dict[str, FloatArray] = {}
    domains = {r.request_id: r.domain for r in fitting}
    for item in track(_decode(engine, fitting), description="decoding", total=len(fitting), transient=True):
        domain = domains[item.request_id]
        sums[domain] = sums.get(domain, np.zeros(5 + 2 * k)) + record_sums(_record(item), k)
    return {
        "overall": summarise(sum(sums.values(), np.zeros(5 + 2 * k)), k),
        "by_domain": {name: summarise(total, k) for name, total in sorted(sums.items())},
        "draft_version": used,
        "k": k,
        "temperature": temperature,
        "skipped_too_long": len(rows) - len(fitting),
    }


def _decode(engine: SpeculativeDecoder, requests: list[DecodeRequest]) -> Iterator[Finished]:
    """Every request's end, as the engine reaches it."""
    waiting = requests[::-1]
    while waiting or engine.active:
        while waiting and engine.can_add():
            engine.add(waiting.pop())
        yield from (delta.finished for delta in engine.step() if delta.finished is not None)


def _record(item: Finished) -> Record:
    s = item.stats
    return Record("", s.emitted, s.rounds, s.proposed, s.accepted, s.reached_at, s.accepted_at, s.draft_version_max)
