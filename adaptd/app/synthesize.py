"""`adaptd synthesize`: a log of queries that the target thought of itself, with its answers, for `adaptd replay`."""

from __future__ import annotations

import gzip
import itertools
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from rich.progress import Progress

from adaptd.actors.parts import Pair, load_pair
from adaptd.app.evaluate import apply_version
from adaptd.config import Config
from adaptd.decoding.build import build_engine, eos_ids
from adaptd.decoding.engine import SpeculativeDecoder
from adaptd.decoding.request import DecodeRequest, Finished, SamplingParams
from adaptd.errors import AdaptdError
from adaptd.ingest.record import Message
from adaptd.ingest.synthesize import Filters, PreQuery, pre_query
from adaptd.models.chat import render_chat
from adaptd.report.replay import progress_columns

#: Queries a round of filters and answers.
_ROUND = 64
#: Queries refused in a row after which a domain is given up: the target has no more to say there.
_PATIENCE = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class SynthesisOptions:
    """What the command line says."""

    n: int
    """Queries of each domain."""
    domains: Sequence[tuple[str, str]] = (("", ""),)
    """Name of each domain, and the system prompt that asks for it."""
    query_temperature: float = 1.0
    temperature: float = 1.0
    max_query: int = 128
    max_tokens: int = 256


def run(config: Config, out: Path, options: SynthesisOptions) -> dict[str, Any]:
    """Write the log; how many queries were kept, and why others were not.

    Raises:
      AdaptdError: `out` is there already or cannot be written, or the target gives no usable query of a domain.
    """
    started = time.monotonic()
    if out.exists():
        raise AdaptdError(f"{out} exists: name a new file, or remove it")
    pair = load_pair(config, config.ray.decoder_gpus)
    apply_version(config, pair, None)
    maker = _Maker(config, pair, options)
    refused: Counter[str] = Counter()
    kept: Counter[str] = Counter()
    partial = out.with_name(f"{out.name}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with _open(partial, out) as file, Progress(*progress_columns(), transient=True) as progress:
            task = progress.add_task("synthesising", total=options.n * len(options.domains), unit="queries")
            for domain, system in options.domains:
                for row in maker.domain(domain, system, refused):
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                    kept[domain] += 1
                    progress.advance(task)
        partial.replace(out)
    except OSError as error:
        raise AdaptdError(f"{out} cannot be written: {error.strerror}") from error
    finally:
        partial.unlink(missing_ok=True)
    return {
        "path": str(out),
        "queries": kept.total(),
        "by_domain": dict(kept),
        "refused": dict(refused.most_common()),
        "seconds": round(time.monotonic() - started, 1),
    }


def _open(path: Path, named: Path) -> TextIO:
    return gzip.open(path, "wt", encoding="utf-8") if named.suffix == ".gz" else path.open("w", encoding="utf-8")


class _Maker:
    """Queries and answers with one engine."""

    def __init__(self, config: Config, pair: Pair, options: SynthesisOptions) -> None:
        self._config, self._pair, self._options = config, pair, options
        self._ends = eos_ids(pair.target, pair.tokenizer)
        self._answers = build_engine(config, pair.target, pair.draft.model, pair.tokenizer, capture=False)
        self._filters = Filters()
        self._numbers = itertools.count()

    def domain(self, domain: str, system: str, refused: Counter[str]) -> Iterator[dict[str, Any]]:
        """Rows of one domain, `options.n` of them.

        Raises:
          AdaptdError: too many queries in a row are of no use.
        """
        where = pre_query(self._pair.tokenizer, system, self._ends)
        engine = self._engine(where)
        found = useless = 0
        while found < self._options.n:
            queries = []
            for done in self._queries(engine, where, 2 * (self._options.n - found)):
                text, reason = self._judged(done, where)
                if reason:
                    refused[reason] += 1
                    useless += 1
                else:
                    queries.append(text)
                    useless = 0
            if useless >= _PATIENCE:
                raise AdaptdError(
                    f"domain {domain!r}: the last {useless} queries were of no use ({refused.most_common(1)[0][0]}): raise "
                    "--max-query or --query-temperature, or give another system prompt"
                )
            for row in self._answered(queries[: self._options.n - found], domain, system):
                found += 1
                yield row

    def _queries(self, engine: SpeculativeDecoder, where: PreQuery, most: int) -> list[Finished]:
        """A round of completions of the pre-query template, at most so many."""
        params = [
            SamplingParams(
                temperature=self._options.query_temperature,
                max_tokens=min(self._options.max_query, engine.max_length - len(where.prompt)),
                seed=self._seed(),
            )
            for _ in range(min(_ROUND, most))
        ]
        return _decode(engine, [DecodeRequest(str(i), where.prompt, p, store=False) for i, p in enumerate(params)])

    def _engine(self, where: PreQuery) -> SpeculativeDecoder:
        """The answering engine, or one like it that also stops where a user's turn ends."""
        if where.ends <= self._answers.eos_ids:
            return self._answers
        engine = build_engine(
            self._config, self._pair.target, self._pair.draft.model, self._pair.tokenizer, capture=False
        )
        engine.eos_ids = where.ends
        return engine

    def _judged(self, done: Finished, where: PreQuery) -> tuple[str, str]:
        ids = [i for i in done.token_ids if i not in where.ends]
        text = str(self._pair.tokenizer.decode(ids, skip_special_tokens=True)).strip()
        return text, self._filters.refuse(ids, text, ended=done.finish_reason == "stop")

    def _answered(self, queries: Sequence[str], domain: str, system: str) -> Iterator[dict[str, Any]]:
        options = self._options
        asked = [self._messages(query, system) for query in queries]
        requests = []
        for i, messages in enumerate(asked):
            prompt = tuple(render_chat(self._pair.tokenizer, messages))
            if len(prompt) + 1 >= self._answers.max_length:
                continue
            params = SamplingParams(
                temperature=options.temperature,
                max_tokens=min(options.max_tokens, self._answers.max_length - len(prompt)),
                seed=self._seed(),
            )
            requests.append(DecodeRequest(str(i), prompt, params, store=False))
        for done in sorted(_decode(self._answers, requests), key=lambda d: int(d.request_id)):
            yield {
                "domain": domain,
                "request": {
                    "model": self._config.target.model,
                    "messages": asked[int(done.request_id)],
                    "temperature": options.temperature,
                    "max_tokens": options.max_tokens,
                },
                "response": {
                    "id": f"synthetic-{next(self._numbers)}",
                    "model": self._config.target.model,
                    "choices": [
                        {
                            "index": 0,
                            "message": {"role": "assistant", "content": done.text},
                            "token_ids": list(done.token_ids),
                            "finish_reason": done.finish_reason,
                        }
                    ],
                },
            }

    def _messages(self, query: str, system: str) -> list[Message]:
        messages: list[Message] = [{"role": "system", "content": system}] if system else []
        return [*messages, {"role": "user", "content": query}]

    def _seed(self) -> int:
        return self._config.seed * 1_000_003 + next(self._numbers)


def _decode(engine: SpeculativeDecoder, requests: Sequence[DecodeRequest]) -> list[Finished]:
    waiting = list(reversed(requests))
    found = []
    while waiting or engine.active:
        while waiting and engine.can_add():
            engine.add(waiting.pop())
        found += [d.finished for d in engine.step() if d.finished is not None]
    return found
