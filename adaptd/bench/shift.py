"""`adaptd bench shift`: one stream, one target, one starting draft, one order of requests; several learners side by side.

Serving is the exact shortcut of `adaptd.bench.verify`; learning is the real thing. Learners of one seed run in separate
processes, one thread each, and meet only in the cache of answers.
"""

from __future__ import annotations

import dataclasses
import itertools
import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from adaptd import log
from adaptd.actors.parts import Pair, load_pair
from adaptd.actors.threads import set_threads
from adaptd.bench import metrics
from adaptd.bench.answers import AnswerPool, read_answers
from adaptd.bench.learners import LearnerSpec, build
from adaptd.bench.stream import Source, Stream, plan
from adaptd.bench.verify import verify
from adaptd.config import Config
from buffers.trace import Trace

#: Files of answers by target and domain.
Answers = Mapping[Source, Path]
#: `target_id` of the configuration's target; any other has its name.
_DEFAULT_TARGET = "bench"
#: Requests served by one version at least: as if this many were in flight.
CHUNK = 16


@dataclass(frozen=True, slots=True)
class Run:
    """One learner on one stream with one seed."""

    stream: str
    learner: str
    seed: int
    lr: float | None
    emitted: list[float]
    rounds: list[float]
    versions: list[int]
    trainable_fraction: float
    trainable_bytes: int
    bytes_per_position: float
    tokens_per_s: float | None
    learner_s: float
    steps: int

    @property
    def curve(self) -> metrics.Curve:
        """For the metrics."""
        return metrics.Curve(np.array(self.emitted), np.array(self.rounds))


def fill(
    config: Config,
    pair: Pair,
    prompts: Mapping[str, Sequence[str]],
    stream: Stream,
    spare: bool = False,
    target: str | None = None,
) -> dict[Source, Path]:
    """The files of one target's answers in a stream, generated where they are not there yet.

    Args:
      pair: with that target.
      spare: as many again.
      target: as the stream's phases name it.
    """
    answers = AnswerPool(
        pair,
        {d: prompts[d] for d in stream.domains if d in prompts},
        config.home / "bench",
        temperature=stream.temperature,
        max_tokens=stream.max_tokens,
        k=config.engine.k,
        k_top=config.capture.k_top,
        max_length=config.engine.max_length,
    )
    return {
        source: answers.fill(source.domain, 2 * n if spare else n)
        for source, n in stream.pool().items()
        if source.target == target
    }


def fill_all(
    config: Config, prompts: Mapping[str, Sequence[str]], streams: Sequence[Stream], spare: bool
) -> dict[str, Answers]:
    """The files of every stream, by its name; one target is loaded at a time."""
    files: dict[str, dict[Source, Path]] = {stream.name: {} for stream in streams}
    for target in dict.fromkeys(target for stream in streams for target in stream.targets):
        pair = load_pair(_with_target(config, target), 0.0)
        for stream in streams:
            if target in stream.targets:
                files[stream.name] |= fill(config, pair, prompts, stream, spare, target)
    return dict(files)


def _with_target(config: Config, target: str | None) -> Config:
    if target is None:
        return config
    return config.model_copy(update={"target": config.target.model_copy(update={"model": target})})


def spare_answers(answers: Answers, stream: Stream, seed: int) -> list[Trace]:
    """As many answers of each source as the stream asks for, none of them one of its own, in random order."""
    slots = plan(stream, seed)
    rng = np.random.default_rng([seed, 0x0DD])
    found: list[Trace] = []
    for source, path in answers.items():
        used = {s.draw for s in slots if s.source == source}
        pool = [a for i, a in enumerate(read_answers(path, 2 * stream.pool()[source])) if i not in used]
        found += [pool[i] for i in rng.permutation(len(pool))[: len(used)]]
    return [found[i] for i in rng.permutation(len(found))]


def requests(answers: Answers, stream: Stream, seed: int) -> list[Trace]:
    """The stream's answers in the order of one seed; each request has an id of its own, each target one in `target_id`."""
    by_source = {source: read_answers(answers[source], n) for source, n in stream.pool().items()}
    return [
        dataclasses.replace(
            by_source[s.source][s.draw],
            request_id=f"{seed}-{i}-{s.source.domain}",
            target_id=s.source.target or _DEFAULT_TARGET,
        )
        for i, s in enumerate(plan(stream, seed))
    ]


def chunks(answers: Sequence[Trace]) -> Iterator[list[Trace]]:
    """`CHUNK` requests at a time, never of two targets: a server that changes its target is restarted."""
    for _, group in itertools.groupby(answers, key=lambda answer: answer.target_id):
        same = list(group)
        for start in range(0, len(same), CHUNK):
            yield same[start : start + CHUNK]


def serve(config: Config, files: Answers, stream: Stream, spec: LearnerSpec, seed: int) -> Run:
    """Run one learner over one stream."""
    set_threads(1)
    log.configure("error", "json")
    answers = requests(files, stream, seed)
    learner = build(spec, config, seed)
    learner.prepare(spare_answers(files, stream, seed) if spec.held_out else answers)
    rng = np.random.default_rng([seed, 0xACCE])
    emitted: list[float] = []
    rounds: list[float] = []
    versions: list[int] = []
    kept = positions = 0
    target = answers[0].target_id
    for chunk in chunks(answers):
        if chunk[0].target_id != target:
            target = chunk[0].target_id
            learner.change_target(target)
        found, traces = verify(
            learner.model, chunk, learner.config.engine.k, rng, version=learner.version, recall=learner.recall
        )
        emitted += [p.emitted for p in found]
        rounds += [p.rounds for p in found]
        versions += [learner.version] * len(chunk)
        kept += sum(learner.captured(t) for t in traces)
        positions += sum(t.response_len for t in traces)
        learner.observe(traces)
    trained = learner.trainable_fraction * sum(p.numel() for p in learner.model.parameters())
    return Run(
        stream=stream.name,
        learner=spec.name,
        seed=seed,
        lr=None if spec.kind == "frozen" else learner.config.learn.lr,
        emitted=emitted,
        rounds=rounds,
        versions=versions,
        trainable_fraction=learner.trainable_fraction,
        trainable_bytes=round(4 * trained),
        bytes_per_position=kept / positions,
        tokens_per_s=learner.trained_tokens / learner.seconds if learner.seconds else None,
        learner_s=learner.seconds,
        steps=learner.steps,
    )


def sweep(
    config: Config,
    prompts: Mapping[str, Sequence[str]],
    streams: Sequence[Stream],
    specs: Sequence[LearnerSpec],
    seeds: Sequence[int],
    jobs: int,
) -> Iterator[Run]:
    """Every learner on every stream with every seed, in `jobs` processes, as they end.

    The oracle runs at each of its rates; the caller keeps the best (`best_of`).
    """
    files = fill_all(config, prompts, streams, any(spec.held_out for spec in specs))
    tasks = [
        (config, files[stream.name], stream, variant, seed)
        for stream, seed, spec in itertools.product(streams, seeds, specs)
        for variant in variants(spec)
    ]
    # The longest first: the last ones decide how long a processor waits at the end.
    tasks.sort(key=lambda task: task[3].kind != "oracle")
    if jobs == 1:
        yield from (serve(*task) for task in tasks)
        return
    # Spawned: a forked process inherits the locks of torch's threads.
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as workers:
        futures: list[Future[Run]] = [workers.submit(serve, *task) for task in tasks]
        try:
            yield from (future.result() for future in as_completed(futures))
        except BaseException:
            workers.shutdown(wait=False, cancel_futures=True)
            raise


def variants(spec: LearnerSpec) -> list[LearnerSpec]:
    """The oracle once for each of its rates, any other learner as it is."""
    return [spec.with_rate(rate) for rate in spec.rates] if spec.kind == "oracle" and spec.rates else [spec]


def best_of(runs: Sequence[Run]) -> list[Run]:
    """One run per stream, learner and seed: that of the rate with the highest MAL over the whole stream."""
    best: dict[tuple[str, str, int], Run] = {}
    for run in runs:
        key = (run.stream, run.learner, run.seed)
        if key not in best or run.curve.mal(0, len(run.rounds)) > best[key].curve.mal(0, len(run.rounds)):
            best[key] = run
    return sorted(best.values(), key=lambda r: (r.stream, r.learner, r.seed))


def summarise(stream: Stream, runs: Sequence[Run], settle: int) -> dict[str, Any]:
    """One stream of the result file (design section 4), from one run of each of its learners and seeds."""
    edges = np.cumsum([0, *(p.requests for p in stream.phases)]).tolist()
    phases = list(itertools.pairwise(edges))
    names = list(dict.fromkeys(r.learner for r in runs))
    found = {name: {r.seed: r for r in runs if r.learner == name} for name in names}
    frozen, oracle = found.get("frozen", {}), found.get("offline_oracle", {})
    back = _return(stream)
    learners = {}
    for name, by_seed in found.items():
        shared = [s for s in by_seed if s in frozen and s in oracle]
        triples = [(by_seed[s].curve, frozen[s].curve, oracle[s].curve) for s in shared]
        any_run = next(iter(by_seed.values()))
        learners[name] = {
            "recovery": metrics.interval([metrics.recovery(*t, phases) for t in triples]),
            "recovery_settled": metrics.interval([metrics.recovery(*t, phases, settle) for t in triples]),
            "recovery_by_phase": [metrics.interval([metrics.recovery(*t, [p]) for t in triples]) for p in phases],
            "time_to_90": [metrics.interval([metrics.time_to(*t, p) for t in triples]) for p in phases],
            "mal_by_phase": [metrics.interval([r.curve.mal(*p) for r in by_seed.values()]) for p in phases],
            "final_mal": [
                metrics.interval([r.curve.mal(max(p[0], p[1] - 100), p[1]) for r in by_seed.values()]) for p in phases
            ],
            "forgetting": metrics.interval(
                [
                    metrics.forgetting(run.curve, frozen[s].curve, phases[back[0]], phases[back[1]])
                    for s, run in by_seed.items()
                    if s in frozen
                ]
                if back
                else []
            ),
            "trainable_fraction": any_run.trainable_fraction,
            "trainable_bytes": any_run.trainable_bytes,
            "bytes_per_position": float(np.mean([r.bytes_per_position for r in by_seed.values()])),
            "tokens_per_s": metrics.interval([r.tokens_per_s for r in by_seed.values() if r.tokens_per_s]),
            "learner_s": metrics.interval([r.learner_s for r in by_seed.values()]),
            "lr": sorted({r.lr for r in by_seed.values() if r.lr is not None}),
            "seeds": sorted(by_seed),
        }
    return {
        "about": stream.about,
        "temperature": stream.temperature,
        "settle": settle,
        "phases": [{"label": p.label, "requests": p.requests} for p in stream.phases],
        "learners": learners,
    }


def _return(stream: Stream) -> tuple[int, int] | None:
    """The last phase and the first one of the same unmoving traffic and target, if it comes back."""
    last = len(stream.phases) - 1
    end = stream.phases[last]
    same = [
        i for i, p in enumerate(stream.phases[:last]) if p.to is None and p.mix == end.mix and p.target == end.target
    ]
    return (same[0], last) if same and same[0] < last - 1 else None
