"""`adaptd bench shift`: one stream, one target, one starting draft, one order of requests; several learners side by side.

Serving is the exact shortcut of `adaptd.bench.verify`; learning is the real thing. Runs are separate processes of one
thread each, and meet only in the cache of answers.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from adaptd.actors.parts import load_pair
from adaptd.bench import metrics
from adaptd.bench.answers import AnswerPool, file_again, read_answers
from adaptd.bench.branches import BranchScorer, build_scorer
from adaptd.bench.learners import Learner, LearnerSpec, build
from adaptd.bench.run import Run, RunLog, run_key
from adaptd.bench.stream import Source, Stream, plan
from adaptd.bench.verify import verify
from adaptd.bench.workers import each
from adaptd.config import Config
from adaptd.errors import ConfigError
from buffers.trace import Trace, is_reserved

#: Files of answers by target and domain.
Answers = Mapping[Source, Path]
#: `target_id` of the configuration's target; any other has its name.
_DEFAULT_TARGET = "bench"
#: Requests served by one version at least: as if this many were in flight.
CHUNK = 16


def fill(config: Config, prompts: Sequence[str], stream: Stream, source: Source, n: int, again: int) -> Path:
    """The file of one source's answers, the first `n` of them generated where they are not there yet, and `again` times anew."""
    answers = AnswerPool(
        load_pair(_with_target(config, source.target), 0.0),
        {source.domain: prompts},
        config.home / "bench",
        temperature=stream.temperature,
        max_tokens=stream.max_tokens,
        k=config.engine.k,
        k_top=config.capture.k_top,
        k_tail=config.capture.k_tail,
        max_length=config.engine.max_length,
    )
    for number in range(1, again + 1):
        answers.fill(source.domain, n, again=number)
    return answers.fill(source.domain, n)


def fill_all(
    config: Config,
    prompts: Mapping[str, Sequence[str]],
    streams: Sequence[Stream],
    spare: bool,
    jobs: int,
    again: int = 0,
) -> dict[str, Answers]:
    """The files of every stream, by its name; no file is written by two processes.

    Args:
      spare: as many answers more, to be held out.
      again: other answers to each prompt, in files of their own.
    """
    wanted: dict[tuple[Source, float, int], tuple[Stream, int]] = {}
    for stream in streams:
        for source, n in stream.pool().items():
            key = (source, stream.temperature, stream.max_tokens)
            known = wanted[key][1] if key in wanted else 0
            wanted[key] = (stream, max(known, 2 * n if spare else n))
    for source, *_ in wanted:
        if source.domain not in prompts:
            raise ConfigError(f"no prompts of domain {source.domain!r}; there are: {', '.join(sorted(prompts))}")
    tasks = [(config, prompts[key[0].domain], stream, key[0], n, again) for key, (stream, n) in wanted.items()]
    paths: dict[tuple[Source, float, int], Path] = {}
    keys = list(wanted)
    for index, path in each(fill, tasks, jobs):
        paths[keys[index]] = path
    return {s.name: {source: paths[source, s.temperature, s.max_tokens] for source in s.pool()} for s in streams}


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


def answers_again(answers: Answers, stream: Stream, seed: int, again: int) -> dict[str, list[Trace]]:
    """What the target says when it is asked the stream's prompts `again` times, by request id."""
    found: dict[str, list[Trace]] = {}
    for number in range(1, again + 1):
        files = {source: file_again(path, number) for source, path in answers.items()}
        for request in requests(files, stream, seed):
            other = dataclasses.replace(request, request_id=f"{request.request_id}-again{number}")
            found.setdefault(request.request_id, []).append(other)
    return found


def chunks(answers: Sequence[Trace]) -> Iterator[list[Trace]]:
    """`CHUNK` requests at a time, never of two targets: a server that changes its target is restarted."""
    for _, group in itertools.groupby(answers, key=lambda answer: answer.target_id):
        same = list(group)
        for start in range(0, len(same), CHUNK):
            yield same[start : start + CHUNK]


def serve(config: Config, files: Answers, stream: Stream, spec: LearnerSpec, seed: int) -> Run:
    """Run one learner over one stream."""
    answers = requests(files, stream, seed)
    learner = build(spec, config, seed)
    learner.prepare(spare_answers(files, stream, seed) if spec.held_out else answers)
    again = answers_again(files, stream, seed, learner.config.capture.again)
    rng, idle = np.random.default_rng([seed, 0xACCE]), np.random.default_rng([seed, 0xA6A])
    emitted: list[float] = []
    rounds: list[float] = []
    versions: list[int] = []
    kept = positions = tokens = 0
    target, k = answers[0].target_id, learner.config.engine.k
    scorer = _scorer(config, learner, target, seed) if spec.learns else None
    for chunk in chunks(answers):
        if chunk[0].target_id != target:
            target = chunk[0].target_id
            learner.change_target(target)
            scorer = _scorer(config, learner, target, seed) if spec.learns else None
        found, traces = verify(
            learner.model, chunk, k, rng, version=learner.version, recall=learner.recall, scorer=scorer
        )
        emitted += [p.emitted for p in found]
        rounds += [p.rounds for p in found]
        versions += [learner.version] * len(chunk)
        kept += sum(learner.captured(t) for t in traces)
        tokens += sum(t.response_len for t in traces)
        positions += sum(t.response_len + (0 if t.branches is None else len(t.branches.tokens)) for t in traces)
        learner.observe(traces, _verified(learner, chunk, again, idle, scorer))
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
        bytes_per_token=kept / tokens,
    )


def _scorer(config: Config, learner: Learner, target: str, seed: int) -> BranchScorer | None:
    """What scores the proposals behind rejections for a learner, if it is to learn from them."""
    share = learner.config.capture.reserved_share
    return build_scorer(
        learner.config,
        load_pair(_with_target(config, None if target == _DEFAULT_TARGET else target), 0.0).target,
        learner.model,
        np.random.default_rng([seed, 0xB4A]),
        wanted=lambda trace: not is_reserved(trace.request_id, share),
    )


def _verified(
    learner: Learner,
    chunk: Sequence[Trace],
    again: Mapping[str, Sequence[Trace]],
    rng: np.random.Generator,
    scorer: BranchScorer | None,
) -> Mapping[str, Sequence[Trace]]:
    """The further answers of a chunk's requests as idle decoders leave them, by request id."""
    others = {t.request_id: again[t.request_id] for t in chunk if again.get(t.request_id)}
    if scorer is None or not others:
        return others
    flat = [answer for group in others.values() for answer in group]
    found = verify(learner.model, flat, learner.config.engine.k, rng, version=learner.version, scorer=scorer)
    left = iter(found[1])
    return {request: [next(left) for _ in group] for request, group in others.items()}


def sweep(
    config: Config,
    prompts: Mapping[str, Sequence[str]],
    streams: Sequence[Stream],
    specs: Sequence[LearnerSpec],
    seeds: Sequence[int],
    jobs: int,
    known: RunLog | None = None,
) -> Iterator[Run]:
    """Every learner on every stream with every seed, in `jobs` processes, as they end.

    The oracle runs at each of its rates; the caller keeps the best (`best_of`).

    Args:
      known: runs that it holds are not repeated, new ones are added to it.
    """
    tasks = []
    for stream, seed, spec in itertools.product(streams, seeds, specs):
        for variant in variants(spec):
            found = known.get(run_key(config, stream, variant, seed)) if known is not None else None
            if found is not None:
                yield found
            else:
                tasks.append((stream, variant, seed))
    # The longest first: the last ones decide how long a processor waits at the end.
    tasks.sort(key=lambda task: (task[1].kind == "frozen", task[2]))
    left = [stream for stream in streams if any(task[0] is stream for task in tasks)]
    again = max((spec.configured(config).capture.again for spec in specs), default=0)
    files = fill_all(config, prompts, left, any(spec.held_out for spec in specs), jobs, again)
    for index, run in each(serve, [(config, files[task[0].name], *task) for task in tasks], jobs):
        if known is not None:
            known.add(run_key(config, *tasks[index]), run)
        yield run


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
            "bytes_per_token": float(np.mean([r.bytes_per_token or r.bytes_per_position for r in by_seed.values()])),
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
