"""What a stream whose target changes does to answers, chunks and learners."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adaptd.bench import shift
from adaptd.bench.learners import Cycle, Learner, LearnerSpec, build
from adaptd.bench.stream import Phase, Source, Stream
from adaptd.config import Config, load
from adaptd.errors import ConfigError
from buffers.synthetic import synthetic_trace
from buffers.trace import Trace

STREAM = Stream(name="t", phases=(Phase(mix={"a": 1}, requests=20), Phase(mix={"a": 1}, requests=40, target="tuned")))
FILES = {source: Path(source.target or "base") for source in STREAM.pool()}


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers that say who gave them: the draft version is the number, the domain the file."""

    def read(path: Path, n: int) -> list[Trace]:
        rng = np.random.default_rng(0)
        return [dataclasses.replace(synthetic_trace(rng), draft_version=i, domain=str(path)) for i in range(n)]

    monkeypatch.setattr(shift, "read_answers", read)


def test_each_phase_has_the_answers_of_its_target_and_they_say_so(answers: None) -> None:
    found = shift.requests(FILES, STREAM, 0)
    assert [t.domain for t in found] == ["base"] * 20 + ["tuned"] * 40
    assert [t.target_id for t in found] == ["bench"] * 20 + ["tuned"] * 40
    assert len({t.request_id for t in found}) == 60


def test_spare_answers_are_as_many_of_each_target_and_none_of_the_streams(answers: None) -> None:
    used = {(t.domain, t.draft_version) for t in shift.requests(FILES, STREAM, 0)}
    spare = [(t.domain, t.draft_version) for t in shift.spare_answers(FILES, STREAM, 0)]
    assert len(set(spare)) == 60
    assert sum(domain == "tuned" for domain, _ in spare) == 40
    assert not used & set(spare)


def test_prompts_asked_again_have_other_answers_under_names_of_their_own(answers: None) -> None:
    asked = shift.requests(FILES, STREAM, 0)
    again = shift.answers_again(FILES, STREAM, 0, 2)
    assert list(again) == [t.request_id for t in asked]
    for request in asked:
        first, second = again[request.request_id]
        assert (first.request_id, second.request_id) == (f"{request.request_id}-again1", f"{request.request_id}-again2")
        # The same prompt, so the same number, in the first and the second of the files beside.
        assert first.draft_version == second.draft_version == request.draft_version
        assert (first.domain, second.domain) == (f"{request.domain}-again1", f"{request.domain}-again2")
        assert first.target_id == request.target_id
    assert all(not found for found in shift.answers_again(FILES, STREAM, 0, 0).values())


def test_no_chunk_is_of_two_targets(answers: None) -> None:
    found = list(shift.chunks(shift.requests(FILES, STREAM, 0)))
    assert [len(c) for c in found] == [16, 4, 16, 16, 8]
    assert all(len({t.target_id for t in c}) == 1 for c in found)


def test_each_source_is_answered_once_for_all_streams_that_want_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Source, int]] = []

    def fill(config: Config, prompts: Any, stream: Stream, source: Source, n: int, again: int) -> Path:
        asked.append((source, n))
        assert again == 2
        return Path(f"{source.target}-{source.domain}-{stream.temperature}")

    monkeypatch.setattr(shift, "fill", fill)
    longer = Stream(name="o", phases=(Phase(mix={"a": 1}, requests=80),))
    hot = longer.model_copy(update={"name": "h", "temperature": 1.5})
    found = shift.fill_all(load(None), {"a": ["?"]}, [STREAM, longer, hot], False, 1, again=2)
    base, tuned = Source(None, "a"), Source("tuned", "a")
    assert asked == [(base, longer.pool()[base]), (tuned, STREAM.pool()[tuned]), (base, hot.pool()[base])]
    assert found == {
        "t": {base: Path("None-a-0.8"), tuned: Path("tuned-a-0.8")},
        "o": {base: Path("None-a-0.8")},
        "h": {base: Path("None-a-1.5")},
    }


def test_a_domain_without_prompts_is_refused_before_anything_is_answered() -> None:
    with pytest.raises(ConfigError, match="no prompts of domain 'a'; there are: b"):
        shift.fill_all(load(None), {"b": ["?"]}, [STREAM], False, 1)


def test_a_domain_that_another_target_answers_has_not_come_back() -> None:
    def stream(last: str | None) -> Stream:
        mixes = [({"a": 1.0}, None), ({"b": 1.0}, None), ({"a": 1.0}, last)]
        return Stream(name="r", phases=tuple(Phase(mix=m, requests=8, target=t) for m, t in mixes))

    assert shift._return(stream(None)) == (0, 2)
    assert shift._return(stream("tuned")) is None


def learner(kind: str) -> Learner:
    settings = {"adapt": {"width": 8, "lora_rank": 0, "head_rank": 0, "embed_rank": 0}}
    return build(LearnerSpec.model_validate({"name": kind, "kind": kind, "settings": settings}), load(None), 0)


def test_a_cycle_keeps_no_trace_of_the_old_target_and_begins_its_mixture_anew() -> None:
    cycle = learner("cycle")
    assert isinstance(cycle, Cycle)
    rng = np.random.default_rng(0)
    cycle.observe([synthetic_trace(rng, target_id="bench") for _ in range(8)])
    cycle._cycle._batches.steps = 5
    cycle.change_target("tuned")
    info = cycle._table.info()
    assert sum(info.sizes.values()) == 0
    assert cycle._cycle._batches.steps == 0
    cycle.observe([synthetic_trace(rng, target_id="tuned") for _ in range(8)])
    assert sum(cycle._table.info().sizes.values()) > 0


@pytest.mark.parametrize("kind", ["frozen", "cycle"])
def test_recall_starts_empty_as_in_a_restarted_server(kind: str) -> None:
    changed = learner(kind)
    before = changed.recall
    assert before is not None
    changed.change_target("tuned")
    assert changed.recall is not None
    assert changed.recall is not before


def test_an_online_learner_just_goes_on() -> None:
    online = learner("online")
    rng = np.random.default_rng(0)
    online.observe([synthetic_trace(rng) for _ in range(4)])
    online.change_target("tuned")
    assert len(online._waiting) == 4  # type: ignore[attr-defined]
