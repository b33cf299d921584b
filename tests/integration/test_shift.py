"""The shift benchmark on the pocket pair: answers, shortcut against real decoding, and the command line."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adaptd.actors.parts import Pair
from adaptd.bench.answers import AnswerPool, read_answers
from adaptd.bench.verify import verify
from adaptd.config import load
from adaptd.decoding.build import build_engine, build_recall
from adaptd.decoding.engine import SpeculativeDecoder
from adaptd.decoding.request import DecodeRequest, SamplingParams
from adaptd.models.chat import render_chat
from adaptd.models.scope import AdaptedDraft
from adaptd.pocket.shipped import pocket_prompts
from policies.acceptance import mal
from policies.recall import Recall

TOKENS = 16


@pytest.fixture(scope="module")
def pair(pocket_target: Any, pocket_tokenizer: Any) -> Pair:
    from adaptd.actors.parts import load_draft

    draft, identity = load_draft(load(None), "cpu", "float32", serving=True)
    return Pair(pocket_target, draft, pocket_tokenizer, identity)


def pool(pair: Pair, home: Path, temperature: float, **overrides: Any) -> AnswerPool:
    prompts = {"math": pocket_prompts("math")[:40], "medical": pocket_prompts("medical")[:40]}
    settings = {"max_tokens": TOKENS, "k": 4, "k_top": 8, "max_length": 320} | overrides
    return AnswerPool(pair, prompts, home, temperature=temperature, **settings)


def redecoded(pair: Pair, draft: AdaptedDraft, answers: list[Any], temperature: float, seeds: list[int]) -> list[Any]:
    """Real decoding of the same prompts with another draft."""
    config = load(None, ["recall.enabled=false"])
    engine: SpeculativeDecoder = build_engine(config, pair.target, draft.model, pair.tokenizer, capture=False)
    waiting = [
        DecodeRequest(
            request_id=f"{i}",
            prompt_ids=tuple(t.tokens[: t.prompt_len].tolist()),
            params=SamplingParams(temperature=temperature, max_tokens=TOKENS, seed=seed),
        )
        for i, (t, seed) in enumerate(zip(answers, seeds, strict=True))
    ]
    done: dict[str, Any] = {}
    while waiting or engine.active:
        while waiting and engine.can_add():
            engine.add(waiting.pop())
        done |= {d.finished.request_id: d.finished for d in engine.step() if d.finished is not None}
    return [done[f"{i}"] for i in range(len(answers))]


@pytest.fixture(scope="module")
def other_draft() -> AdaptedDraft:
    """Not the draft that the answers were generated with: its learned tensors are random."""
    import torch

    from adaptd.actors.parts import load_draft

    config = load(None, ["adapt.width=16", "adapt.lora_rank=0", "adapt.head_rank=0", "adapt.embed_rank=0"])
    draft, _ = load_draft(config, "cpu", "float32", serving=False)
    generator = torch.Generator().manual_seed(0)
    draft.load({n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in draft.state().items()})
    return draft


def test_at_temperature_0_the_shortcut_is_the_mal_of_real_decoding(
    tmp_path: Path, pair: Pair, other_draft: AdaptedDraft
) -> None:
    answers = [a for d in ("math", "medical") for a in pool(pair, tmp_path, 0.0).get(d, 25)]
    profiles, _ = verify(other_draft.model, answers, 4, np.random.default_rng(0), version=1)
    real = redecoded(pair, other_draft, answers, 0.0, [0] * len(answers))
    assert [p.rounds for p in profiles] == [f.stats.rounds for f in real]
    assert mal(profiles) == sum(f.stats.emitted for f in real) / sum(f.stats.rounds for f in real)
    assert mal(profiles) > 1.05


def test_at_temperature_1_the_shortcut_has_the_distribution_of_real_decoding(
    tmp_path: Path, pair: Pair, other_draft: AdaptedDraft
) -> None:
    """Other texts, the same distribution: expected rounds a token over 96 answers against 96 really decoded ones."""
    answers = [a for d in ("math", "medical") for a in pool(pair, tmp_path, 1.0).get(d, 48)]
    profiles, _ = verify(other_draft.model, answers, 4, np.random.default_rng(0), version=1)
    real = redecoded(pair, other_draft, answers, 1.0, list(range(1000, 1000 + len(answers))))
    shortcut = np.array([p.rounds / p.emitted for p in profiles])
    decoded = np.array([f.stats.rounds / f.stats.emitted for f in real])
    error = np.sqrt(shortcut.var(ddof=1) / len(shortcut) + decoded.var(ddof=1) / len(decoded))
    assert abs(shortcut.mean() - decoded.mean()) < 3 * error
    assert error < 0.06 * decoded.mean(), "or the test could not fail"


@pytest.mark.slow
def test_with_recall_the_shortcut_stays_close_to_real_decoding(pair: Pair) -> None:
    """On the very texts of real decoding with recall. In the shortcut a chunk of requests is remembered when all of it
    has ended, in decoding each as it ends: a few per cent are what that may cost."""
    config = load(None, ["engine.max_batch=16", "capture.reserved_share=0", "recall.seeded=true"])
    engine = build_engine(config, pair.target, pair.draft.model, pair.tokenizer, capture=True)
    waiting = [
        DecodeRequest(
            request_id=f"{i}",
            prompt_ids=tuple(render_chat(pair.tokenizer, [{"role": "user", "content": text}])),
            params=SamplingParams(temperature=0.8, max_tokens=2 * TOKENS, seed=i),
            domain="tools",
        )
        for i, text in enumerate(p for p in pocket_prompts("tools")[:120] if len(p) < 600)
    ][::-1]
    done: list[Any] = []
    while waiting or engine.active:
        while waiting and engine.can_add():
            engine.add(waiting.pop())
        done += [d.finished for d in engine.step() if d.finished is not None]
    assert len(done) >= 64
    traces = [f.trace for f in done]
    emitted = sum(f.stats.emitted for f in done)

    def shortcut(recall: Recall | None) -> float:
        found = []
        for start in range(0, len(traces), 16):
            chunk = traces[start : start + 16]
            found += verify(pair.draft.model, chunk, 4, np.random.default_rng(0), version=0, recall=recall)[0]
        return mal(found)

    real = emitted / sum(f.stats.rounds for f in done)
    without, with_recall = shortcut(None), shortcut(build_recall(config, "cpu"))
    print(f"MAL decoded {real:.3f}, by the shortcut {with_recall:.3f}, without recall {without:.3f}")
    assert real > 1.1 * without, "recall must matter, or the test proves nothing"
    assert with_recall == pytest.approx(real, rel=0.05)


def test_answers_are_kept_and_an_interrupted_run_goes_on(tmp_path: Path, pair: Pair) -> None:
    told: list[int] = []
    first = pool(pair, tmp_path, 1.0, max_tokens=4).get("math", 70, told.append)
    assert sum(told) == 128
    (path,) = tmp_path.rglob("math-*.traces")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 2 // 3])
    again = pool(pair, tmp_path, 1.0, max_tokens=4).get("math", 70)
    assert [t.tokens.tolist() for t in again] == [t.tokens.tolist() for t in first]
    told.clear()
    pool(pair, tmp_path, 1.0, max_tokens=4).get("math", 128, told.append)
    assert not told
    # Asked once more the same prompts have other answers, in a file beside.
    beside = pool(pair, tmp_path, 1.0, max_tokens=4).fill("math", 64, again=1)
    assert beside == path.with_name(f"{path.stem}-again1.traces")
    others = read_answers(beside, 64)
    assert [t.tokens[: t.prompt_len].tolist() for t in others] == [
        t.tokens[: t.prompt_len].tolist() for t in first[:64]
    ]
    assert sum(a.response.tolist() != b.response.tolist() for a, b in zip(others, first[:64], strict=True)) > 50
    pool(pair, tmp_path, 0.5, max_tokens=4)
    assert len({p.parent for p in tmp_path.rglob("*.traces")}) == 1


def test_the_command_runs_learners_side_by_side(tmp_path: Path) -> None:
    stream = tmp_path / "tiny.yaml"
    stream.write_text(
        "max_tokens: 12\nphases:\n- {mix: {medical: 1}, requests: 32}\n- {mix: {math: 1}, requests: 64}\n"
    )
    command = [sys.executable, "-m", "adaptd.cli.main", "bench", "shift", "--stream", str(stream), "--seeds", "1"]
    command += [arg for name in ("frozen", "osd", "ours", "offline_oracle") for arg in ("--learner", name)]
    command += ["--report", str(tmp_path / "report"), "--json", str(tmp_path / "out.json"), "--jobs", "2"]
    command += ["--set", f"state_dir={tmp_path}", "--set", "capture.reserved_share=0.2"]
    command += ["--set", "learn.steps_per_tick=8"]
    # Without echoes nothing is recalled before the first requests have ended.
    command += ["--set", "recall.echo=[]"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    learners = found["streams"]["tiny"]["learners"]
    assert set(learners) == {"frozen", "osd", "ours", "offline_oracle"}
    assert learners["frozen"]["trainable_fraction"] == 0
    assert learners["osd"]["trainable_fraction"] == 1
    assert 0 < learners["ours"]["trainable_fraction"] <= 0.275
    assert learners["osd"]["bytes_per_position"] < learners["ours"]["bytes_per_position"] <= 256
    assert learners["osd"]["bytes_per_token"] == learners["osd"]["bytes_per_position"]
    assert learners["ours"]["bytes_per_token"] > 1.2 * learners["ours"]["bytes_per_position"], (
        "and what is behind rejections"
    )
    by_learner = {(r["learner"], r["seed"]): r for r in found["runs"]}
    assert len(by_learner) == 4
    frozen, ours, oracle = (by_learner[name, 0] for name in ("frozen", "ours", "offline_oracle"))
    assert len(frozen["rounds"]) == 96
    assert frozen["emitted"] == ours["emitted"], "the same answers for all"
    assert frozen["rounds"][:16] == pytest.approx(ours["rounds"][:16]), "day 0 is the base"
    assert set(frozen["versions"]) == {0}
    assert ours["steps"] > 0
    assert sum(oracle["rounds"]) < sum(frozen["rounds"]), "trained on these very answers"
    assert "| ours |" in (tmp_path / "report" / "shift.md").read_text()
    assert (tmp_path / "report" / "tiny.png").stat().st_size > 10_000
    assert "tiny" in (tmp_path / "report" / "tiny.html").read_text()
