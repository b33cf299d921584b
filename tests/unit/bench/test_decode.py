"""`adaptd bench decode`: all decoders find the same tokens, and the summary is that of what was timed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from adaptd.bench import contestants, decode
from adaptd.bench.contestants import Native, NativePlain, Prompts, Sample, Transformers, Vllm
from adaptd.bench.floor import Machine, floor_s
from adaptd.decoding.engine import SpeculativeDecoder
from adaptd.decoding.timing import StepTimes
from adaptd.errors import UpstreamUnavailable
from policies.draft_length import DraftLength
from tests.unit.decoding.tiny import make_draft, make_model, make_prompts


@pytest.mark.parametrize("batch", [1, 3])
def test_all_decoders_find_the_same_tokens(batch: int) -> None:
    target = make_model(vocab=97)
    draft = make_draft(target, noise=0.004)
    prompts = make_prompts(batch, 97, shortest=2)
    engine = SpeculativeDecoder(target, draft, k=3, max_batch=batch, max_length=80)
    found = {
        "native": Native(engine).run(prompts, 12),
        "plain": NativePlain(target, batch=batch, max_length=96).run(prompts, 12),
        "transformers": Transformers(target, None, 3).run(prompts, 12),
    }
    if batch == 1:
        found["assisted"] = Transformers(target, draft, 3).run(prompts, 12)
        # transformers verifies the first proposals together with the prompt; both count passes of the target.
        assert abs(found["assisted"].rounds - found["native"].rounds) <= 1
    assert len({json.dumps(sample.answers) for sample in found.values()}) == 1
    assert found["plain"].rounds == found["transformers"].rounds == 12 * batch > found["native"].rounds


def test_a_chosen_draft_length_goes_by_the_domain_of_a_prompt() -> None:
    target = make_model(vocab=97)
    lengths = DraftLength(3)
    engine = SpeculativeDecoder(target, make_draft(target), k=3, max_batch=2, max_length=80, draft_length=lengths)
    prompts = make_prompts(2, 97)
    Native(engine, {tuple(prompts[0]): "medical"}).run(prompts, 40)
    assert set(lengths.chosen) == {"medical", ""}


def test_costs_are_of_the_whole_batch_and_nothing_is_left_behind() -> None:
    target = make_model(vocab=97)
    engine = SpeculativeDecoder(target, make_draft(target), k=3, max_batch=3, max_length=80)
    native, prompts = Native(engine), make_prompts(3, 97)
    times = native.costs(prompts, 20)
    assert times is not None
    assert (times.batch, engine.active) == (3, 0)
    assert len(native.run(prompts, 5).answers) == 3


class Fixed:
    """Says the same at a given speed."""

    def __init__(self, seconds: float, rounds: int, said: Callable[[Prompts], list[list[int]]], log: list[str]) -> None:
        self.seconds, self.rounds, self.said, self.log = seconds, rounds, said, log

    def run(self, prompts: Prompts, tokens: int) -> Sample:
        self.log.append(f"{self.seconds:g}:{prompts[0][0]}")
        return Sample(self.seconds * len(self.log), self.said(prompts), self.rounds)

    def close(self) -> None:
        pass


def test_rounds_turn_the_order_and_ratios_are_of_one_round() -> None:
    log: list[str] = []
    four, odd = (lambda p: [[1, 2, 3, 4]] * len(p)), (lambda p: [[1, 2, 9, 4]] * len(p))
    players: dict[str, Any] = {
        decode.OURS: Fixed(1.0, 2, four, log),
        decode.PLAIN: Fixed(2.0, 4, four, log),
        "vllm": Fixed(3.0, 2, odd, log),
    }
    cell = decode.play(players, [[[7]], [[8]]], k=3, rounds=2, tokens=4)
    assert log == ["3:8", "1:8", "2:8", "1:7", "2:7", "3:7", "2:8", "3:8", "1:8"]
    cell.times = [StepTimes(1, 3, 0.1, 1.0, 1.2)]
    rows, ratios = decode.summarise(cell, dict.fromkeys(players, 0.5))
    by_name = {row["engine"]: row for row in rows}
    assert [by_name[name]["k"] for name in players] == [3, 0, 3]
    assert [by_name[name]["mal"] for name in players] == [2.0, 1.0, 2.0]
    assert [by_name[name]["same_as_plain"] for name in players] == [1.0, 1.0, 0.5]
    ours = by_name[decode.OURS]
    assert ours["floor_ratio"] == pytest.approx(2.0 / ours["tokens_per_s"] / 0.5)
    # Seconds: ours 4 and 9, plain 10 and 14.
    assert ratios["speedup"] == pytest.approx((10 / 4 + 14 / 9) / 2)
    assert ratios["intervals"]["speedup"] == pytest.approx((14 / 9, 10 / 4)), "of two rounds, either may be drawn twice"
    assert set(ratios["intervals"]) == {"speedup", "vs_vllm_cpu"}
    assert ratios["predicted_speedup"] == pytest.approx(2.0 / 1.5)
    assert ratios["vs_transformers_assisted"] is None


def test_the_floor_is_memory_at_one_row_and_arithmetic_at_many() -> None:
    model = nn.Sequential(nn.Linear(10, 10, bias=False))
    machine = Machine(bytes_per_s=400.0, flops_per_s=2000.0)
    assert floor_s(machine, [(model, 1)]) == pytest.approx(1.0)
    assert floor_s(machine, [(model, 100), (model, 1)]) == pytest.approx(10.0 + 1.0)


def test_a_vllm_that_does_not_start_names_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text("raise SystemExit(3)\n")
    monkeypatch.setattr(contestants.vllm_worker, "__file__", str(worker))
    about: dict[str, Any] = {"k": 3, "batch": 1, "dtype": "float32", "max_length": 64}
    with pytest.raises(UpstreamUnavailable, match=r"vllm\.log"):
        Vllm(Path(sys.executable), "t", "d", log=tmp_path / "vllm.log", **about)


def test_vllm_is_asked_over_a_pipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import json, sys\nprint('{}', flush=True)\nfor line in sys.stdin:\n"
        "    asked = json.loads(line)\n"
        "    answer = {'seconds': 0.5, 'tokens': [p[:1] * asked['tokens'] for p in asked['prompts']], 'rounds': 2}\n"
        "    print(json.dumps(answer), flush=True)\n"
    )
    monkeypatch.setattr(contestants.vllm_worker, "__file__", str(worker))
    vllm = Vllm(
        Path(sys.executable), "t", "d", k=3, batch=1, dtype="float32", max_length=64, log=tmp_path / "deep" / "vllm.log"
    )
    assert vllm.run([(5, 6)], 3) == Sample(0.5, [[5, 5, 5]], 2)
    vllm.close()
    assert vllm._process.returncode == 0


def test_the_bound_is_of_torch_weights_without_counting_shared_ones_twice() -> None:
    tied = make_model(tie_word_embeddings=True)
    own = sum(p.numel() for p in tied.parameters())
    assert floor_s(Machine(4.0, 1e12), [(tied, 1)]) == pytest.approx(own)
