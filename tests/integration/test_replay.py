"""`adaptd replay` on the pocket pair: real logs of the real target's answers, a real buffer, the online learner."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from adaptd.app.replay import learning, run
from adaptd.app.replay.lessons import Lesson, Lessons, TeachingOptions
from adaptd.app.replay.models import load_models
from adaptd.app.replay.options import ReplayOptions
from adaptd.config import Config, load
from adaptd.decoding.engine import SpeculativeDecoder
from adaptd.decoding.request import DecodeRequest, SamplingParams
from adaptd.errors import AdaptdError, LogRefused
from adaptd.ingest.read import Reading, read_log
from adaptd.ingest.spool import Spool
from adaptd.learning.cycle import TickReport
from adaptd.pocket.shipped import pocket_prompts
from buffers.embedded import start_embedded
from buffers.open import open_table
from buffers.trace import Trace
from checkpoints.store import CheckpointStore
from tests.contract.test_log_formats import CASES, Case, nameless

RECORDS = 48
SMALL = (
    "engine.max_length=320",
    "learn.steps_per_tick=3",
    "learn.batch_traces=4",
    "learn.min_new_traces=16",
    "capture.reserved_share=0.3",
    "gate.min_traces=2",
    "gate.min_gain=-1",  # every candidate passes: what is tested is what a promotion does
    "gate.max_regression=1",
)
TARGET = TeachingOptions(names=("pocket",))


def decoded(target: Any, draft: Any, tokenizer: Any, domain: str, n: int, max_tokens: int) -> Iterator[dict[str, Any]]:
    """Lines of a log: greedy answers of the target."""
    prompts = [p for p in pocket_prompts(domain) if len(p) < 300][:n]
    engine = SpeculativeDecoder(
        target,
        draft,
        k=4,
        max_batch=16,
        max_length=320,
        eos_ids={2},
        detokenize=lambda i: str(tokenizer.decode(list(i))),
    )
    template = "<|begin|><|user|>{}<|end|><|assistant|>"
    waiting = [
        DecodeRequest(
            str(i),
            tokenizer(template.format(p), add_special_tokens=False)["input_ids"],
            SamplingParams(temperature=0, max_tokens=max_tokens),
        )
        for i, p in enumerate(prompts)
    ]
    while waiting or engine.active:
        while waiting and engine.can_add():
            engine.add(waiting.pop())
        for done in (d.finished for d in engine.step() if d.finished):
            text = tokenizer.decode([t for t in done.token_ids if t != 2])
            choice = {"message": {"role": "assistant", "content": text}, "finish_reason": done.finish_reason}
            messages = [{"role": "user", "content": prompts[int(done.request_id)]}]
            yield {
                "timestamp": 1767323045 + int(done.request_id),
                "domain": domain,
                "request": {"model": "org/pocket", "messages": messages, "temperature": 0, "max_tokens": max_tokens},
                "response": {"choices": [choice]},
            }


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory, pocket_target: Any, pocket_tokenizer: Any) -> Path:
    from adaptd.models import load as models

    torch.set_num_threads(1)
    draft = models.load_causal_lm(models.resolve("pocket", "draft"), dtype="float32", device="cpu")
    path = tmp_path_factory.mktemp("log") / "log"
    rows = list(decoded(pocket_target, draft, pocket_tokenizer, "math", RECORDS, 16))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load(None, [f"state_dir={tmp_path / 'state'}", *SMALL])


def replay(config: Config, log: Path, report: Path, **options: Any) -> dict[str, Any]:
    options.setdefault("teaching", TARGET)
    options.setdefault("reading", Reading(domain_field="domain"))
    return run.run(config, [str(log)], ReplayOptions(**options), report)


def stored(config: Config) -> list[Trace]:
    """What the deployment's buffer holds."""
    server = start_embedded(config.home / "redis")
    try:
        table = open_table(server.url, config.deployment, **config.buffer.model_dump(exclude={"url"}))
        return [s.trace for stratum in ("recent", "reserved") for s in table.all(stratum)]  # type: ignore[arg-type]
    finally:
        server.close()


def test_an_interrupted_replay_goes_on_and_leaves_a_fitted_deployment(
    config: Config, log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[int] = []
    prepare = Lessons.prepare

    def interrupted(self: Lessons, queued: Any) -> list[Lesson]:
        if seen:
            raise KeyboardInterrupt
        seen.extend(q.rank for q in queued)
        return prepare(self, queued)

    monkeypatch.setattr(Lessons, "prepare", interrupted)
    with pytest.raises(KeyboardInterrupt):
        replay(config, log, tmp_path / "report", holdout=0.25)
    assert f"interrupted at record {len(seen)} of {RECORDS}" in capsys.readouterr().out
    assert 0 < len(seen) < RECORDS
    (spool,) = (config.home / "replay").iterdir()
    assert spool.stat().st_mode & 0o077 == 0, "nobody else reads what people wrote"

    def counted(self: Lessons, queued: Any) -> list[Lesson]:
        seen.extend(q.rank for q in queued)
        return prepare(self, queued)

    monkeypatch.setattr(Lessons, "prepare", counted)
    found = replay(config, log, tmp_path / "report", holdout=0.25)
    assert seen == list(range(RECORDS)), "each record once, none again"
    assert "going on with an interrupted replay" in capsys.readouterr().out
    assert found["records"] == RECORDS
    assert found["teacher"]["decided"] == {"target: the log names the target": RECORDS}
    assert found["teacher"]["greedy_agreement"] > 0.99, "recorded answers are the target's own"
    assert found["versions"]["after"] == CheckpointStore(config.home / "checkpoints").current()
    assert found["versions"]["after"] > 0
    assert found["peak_rss_bytes"] > 0
    assert found["recommended_k"] in (0, 1, 2, 3, 4, 6, 8)
    assert 1 <= found["mal_before"]["low"] <= found["mal_before"]["mean"] <= found["mal_before"]["high"] <= 5
    assert list(found["by_domain"]) == ["math"]
    assert sum(row["records"] for row in found["prequential"]["by_time"]) == found["prequential"]["records"]
    # What was held out is nowhere to be learned from or judged on.
    held = RECORDS - found["prequential"]["records"]
    assert held > 0
    kept = stored(config)
    assert len({t.request_id for t in kept}) == RECORDS - held
    # The target was asked what stands behind the draft's rejections, for what is learned from.
    assert all((t.branches is None) == t.reserved for t in kept if len(t.rejected_at))
    assert sum(len(t.branches.tokens) for t in kept if t.branches is not None) > RECORDS
    page = (tmp_path / "report" / "replay.html").read_text()
    assert "data:image/png;base64," in page
    assert (tmp_path / "report" / "replay.png").stat().st_size > 5000
    assert not any((config.home / "replay").iterdir()), "the spool is gone"


def test_a_dry_run_leaves_the_deployment_as_it_is(config: Config, log: Path, tmp_path: Path) -> None:
    """Also of the hard labels that are learned where there is no target."""
    without = config.model_copy(update={"target": config.target.model_copy(update={"model": "/nonexistent/pocket"})})
    found = replay(
        without,
        log,
        tmp_path / "report",
        teaching=TeachingOptions(wanted="auto", names=("pocket",)),
        dry_run=True,
        budget=24,
        select="surprise",
    )
    assert found["dry_run"]
    kept = found["records"]
    assert 24 <= kept < RECORDS
    assert found["refused"] == {"left out by --budget": RECORDS - kept}
    assert found["teacher"]["decided"] == {"black-box: no target at hand": kept}
    assert found["prequential"]["records"] == 24, "what is held out is not of the budget"
    assert "no folder" in found["teacher"]["why_no_target"]
    assert found["versions"]["after"] > found["versions"]["before"] == 0
    assert CheckpointStore(config.home / "checkpoints").current() is None
    assert not (config.home / "redis").exists()


@pytest.mark.slow
def test_questions_are_answered_again_in_the_place_of_another_models_answers(
    config: Config, log: Path, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in log.read_text().splitlines()][:20]
    asked = [{"prompt": r["request"]["messages"][0]["content"], "response": "?"} for r in rows]
    (tmp_path / "other").write_text("".join(json.dumps(row) + "\n" for row in asked))
    found = replay(
        config,
        tmp_path / "other",
        tmp_path / "report",
        teaching=TeachingOptions(wanted="auto", temperature=0, max_tokens=16),
    )
    assert found["teacher"]["decided"] == {"regenerate: the log does not say who wrote the answer": 20}
    recorded = {r["response"]["choices"][0]["message"]["content"] for r in rows}
    tokenizer = load_models(config, "black-box").tokenizer
    again = {tokenizer.decode(t.response[t.response != 2].tolist()) for t in stored(config)}
    assert again
    assert again <= recorded, "greedy answers are what they were"


def test_nothing_to_learn_from_is_said_with_reason_and_remedy(config: Config, tmp_path: Path) -> None:
    (tmp_path / "log").write_text('{"prompt": "2 + 2?", "response": "4"}\n')
    with pytest.raises(LogRefused, match=r"the log does not say who wrote the answer.*--teacher auto"):
        replay(config, tmp_path / "log", tmp_path / "report", reading=Reading())


def test_a_running_daemon_is_not_written_into(config: Config, log: Path, tmp_path: Path) -> None:
    from adaptd.app.state import StateDir

    state = StateDir(config.home)
    try:
        with pytest.raises(AdaptdError, match=r"another daemon runs.*--dry-run"):
            replay(config, log, tmp_path / "report")
    finally:
        state.close()


@pytest.fixture(scope="module")
def loaded() -> Any:
    config = load(None, list(SMALL))
    return config, load_models(config, "auto")


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_formats_fixture_becomes_traces_of_the_target(case: Case, loaded: Any, tmp_path: Path) -> None:
    config, models = loaded
    spool = Spool(tmp_path / "spool", with_answer=True)
    for path in nameless(tmp_path, case):
        for found in read_log(path, Reading()):
            spool.add(found)
    spool.settle()
    spool.order()
    options = TeachingOptions(wanted="auto", names=("pocket",), max_tokens=4, temperature=0)
    lessons = Lessons(config, models, options, spool)
    made = [lesson for batch in spool.walk() for lesson in lessons.prepare(batch)]
    spool.close()
    for lesson in made:
        lesson.trace.validate()
        assert lesson.trace.topk_logprobs[:, 1].min() > -30, "judged by the target, no hard label"
        assert lesson.trace.target_id == models.target_id
    answered = [m for m in made if m.queued.record.answers() and not m.queued.record.error]
    assert len(answered) >= 2
    assert all(m.teacher == ("target" if case.model else "regenerate") for m in answered)
    if case.time:
        assert {m.trace.created_at for m in answered} >= {1767323045.0, 1767323046.0}


def test_a_shift_needs_a_target(config: Config, log: Path, tmp_path: Path) -> None:
    with pytest.raises(AdaptdError, match="take surprise or random"):
        replay(config, log, tmp_path / "r", teaching=TeachingOptions(wanted="black-box"), budget=4, dry_run=True)


@pytest.mark.slow
@pytest.mark.parametrize("select", ["shift", "random"])
def test_a_budget_keeps_that_many_records(select: Any, config: Config, log: Path, tmp_path: Path) -> None:
    found = replay(config, log, tmp_path / "r", budget=20, select=select, oracle=True, dry_run=True, holdout=0.5)
    assert found["prequential"]["records"] == 20
    assert found["records"] > 30, "and half of the log is held out"
    assert found["oracle"]["mal"]["mean"] >= 1


def test_the_settling_ticks_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """After two dozen at most, or two since the last promotion that gain nothing over what was judged before."""

    def report(published: int | None, gain: float | None) -> TickReport:
        verdict = None if gain is None else {"gain": {"mean": gain}}
        return TickReport("settle", published=published, verdict=verdict)

    promoted, slow, none, no_judge = report(1, 0.02), (report(None, 0.002 * i) for i in range(1, 99)), 0.0, None
    rehearsal = object.__new__(learning.Rehearsal)
    for reports, ticks in (
        ([promoted] * 99, 24),
        (slow, 24),
        ([promoted, report(None, none), promoted, report(None, -0.1), report(None, none), promoted], 5),
        ([report(None, 0.01), report(None, 0.005), report(None, 0.02), report(None, 0.01)], 4),
        ([report(None, no_judge)] * 9, 2),
    ):
        given = iter(reports)
        monkeypatch.setattr(learning.Rehearsal, "_tick", lambda self, reason, given=given: next(given))
        assert len(list(rehearsal.settle())) == ticks
