"""Streams: what a YAML file may say, and the order of requests that a seed makes of it."""

from collections import Counter
from pathlib import Path

import pytest

from adaptd.bench.learners import LearnerSpec
from adaptd.bench.stream import Phase, Source, Stream, plan, read_spec
from adaptd.config import load
from adaptd.errors import ConfigError
from policies.selection import Mixture

SHARP = Stream(name="s", phases=(Phase(mix={"a": 1}, requests=30), Phase(mix={"b": 2}, requests=20)))


def test_phases_follow_each_other_and_no_answer_is_served_twice() -> None:
    slots = plan(SHARP, 0)
    assert [s.source.domain for s in slots] == ["a"] * 30 + ["b"] * 20
    assert [s.phase for s in slots] == [0] * 30 + [1] * 20
    assert len({(s.source, s.draw) for s in slots}) == 50
    assert all(s.draw < SHARP.pool()[s.source] for s in slots)


def test_a_seed_decides_the_order_and_the_choice() -> None:
    assert plan(SHARP, 1) == plan(SHARP, 1)
    assert {s.draw for s in plan(SHARP, 1)} != {s.draw for s in plan(SHARP, 2)}


def test_a_moving_mixture_goes_from_one_domain_to_the_other() -> None:
    stream = Stream(name="d", phases=(Phase(mix={"a": 1}, to={"b": 3}, requests=900),))
    slots = plan(stream, 0)
    thirds = [Counter(s.source.domain for s in slots[i : i + 300])["b"] / 300 for i in (0, 300, 600)]
    assert thirds == pytest.approx([1 / 6, 1 / 2, 5 / 6], abs=0.08)
    assert stream.phases[0].label == "a > b"


def test_every_seed_finds_enough_answers_in_the_pool() -> None:
    stream = Stream(name="m", phases=(Phase(mix={"a": 1, "b": 1, "c": 2}, requests=200),))
    for seed in range(300):
        assert len(plan(stream, seed)) == 200


def test_each_target_has_a_pool_of_its_own_and_a_prompt_may_come_again() -> None:
    phases = [Phase(mix={"a": 1}, requests=40, target=target) for target in (None, "tuned", None)]
    stream = Stream(name="t", phases=tuple(phases))
    assert stream.targets == [None, "tuned"]
    pool = stream.pool()
    assert set(pool) == {Source(None, "a"), Source("tuned", "a")}
    assert pool[Source(None, "a")] > 80 > pool[Source("tuned", "a")] > 40
    slots = plan(stream, 0)
    assert [s.source.target for s in slots] == [None] * 40 + ["tuned"] * 40 + [None] * 40
    assert len({(s.source, s.draw) for s in slots}) == 120, "no answer twice"
    assert {s.draw for s in slots[:40]} & {s.draw for s in slots[40:80]}, "prompts may come again"
    assert [p.label for p in phases] == ["a", "a (tuned)", "a"]
    assert [p.target for p in stream.scaled(0.5).phases] == [None, "tuned", None]


def test_only_the_domains_that_a_target_serves_are_in_its_pool() -> None:
    stream = Stream(name="t", phases=(Phase(mix={"a": 1}, requests=9), Phase(mix={"b": 1}, requests=9, target="x")))
    assert set(stream.pool()) == {Source(None, "a"), Source("x", "b")}


def test_scaling_keeps_the_shape() -> None:
    assert [p.requests for p in SHARP.scaled(0.5).phases] == [15, 10]
    assert [p.requests for p in SHARP.scaled(0.01).phases] == [8, 8]


def test_another_temperature_changes_nothing_else() -> None:
    cold = SHARP.at(0.0)
    assert (cold.temperature, SHARP.temperature) == (0.0, 0.8)
    assert cold.model_copy(update={"temperature": 0.8}) == SHARP
    assert plan(cold, 3) == plan(SHARP, 3)
    with pytest.raises(ConfigError, match=r"temperature \(-0.1\) must be at least 0"):
        SHARP.at(-0.1)


@pytest.mark.parametrize("name", ["sharp", "recur", "drift", "mixed"])
def test_shipped_streams_are_read_by_name(name: str) -> None:
    stream = read_spec(Stream, "streams", name)
    assert stream.name == name
    assert sum(p.requests for p in stream.phases) == 2000


def test_the_target_is_replaced_and_the_traffic_stays() -> None:
    stream = read_spec(Stream, "streams", "target_swap")
    assert [(p.target, p.requests) for p in stream.phases] == [(None, 500), ("pocket-math", 500), ("pocket-math", 500)]
    assert stream.domains == ["math"]


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(
        ConfigError,
        match=r"stream \(shrap\) must be a YAML file, or one of: drift, math, mixed, recur, sharp, target_swap",
    ):
        read_spec(Stream, "streams", "shrap")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("phases: []", "at least 1"),
        ("phases: [{mix: {a: 1}, requests: 0}]", "greater than or equal to 1"),
        ("phases: [{mix: {a: -1}, requests: 5}]", "shares of at least 0"),
        ("phases: [{mix: {a: 1}, request: 5}]", "Extra inputs"),
        ("phases: [", "not a stream"),
        ("[1, 2]", "Field required"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_name(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=complaint) as caught:
        read_spec(Stream, "streams", str(path))
    assert "mine.yaml" in str(caught.value)


@pytest.mark.parametrize("path", sorted(Path("configs/learners").rglob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_learners_fit_the_configuration(path: Path) -> None:
    name = str(path.relative_to("configs/learners").with_suffix(""))
    spec = read_spec(LearnerSpec, "learners", name)
    assert (spec.held_out or spec.first is not None) == name.startswith("offline/"), "nothing of what is asked"
    config = spec.configured(load(None))
    for section, values in spec.settings.items():
        for key, value in values.items():
            assert getattr(getattr(config, section), key) == value
    assert spec.about
    assert spec.kind == "frozen" or spec.rates or name.startswith(("offline/", "ablate/"))
    assert spec.with_rate(0.5).configured(load(None)).learn.lr == 0.5
    assert not spec.with_rate(0.5).rates, "or the oracle would be swept again"


def test_only_an_oracle_learns_from_other_answers(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("{kind: cycle, held_out: true}")
    with pytest.raises(ConfigError, match="held_out and first are for an oracle; kind is 'cycle'"):
        read_spec(LearnerSpec, "learners", str(path))


def test_an_unknown_learner_is_named_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"learner \(ouers\) must be a YAML file, or one of: aurora"):
        read_spec(LearnerSpec, "learners", "ouers")


#: Keys that belong together: a cadence is requests and steps in proportion, a gate that is off has no limit left.
TOGETHER = {"batch_16": 2, "every_16": 2, "every_64": 2, "gate_off": 2}


@pytest.mark.parametrize("path", sorted(Path("configs/learners/ablate").glob("*.yaml")), ids=lambda p: p.stem)
def test_an_ablation_is_the_defaults_but_for_one_thing(path: Path) -> None:
    spec = read_spec(LearnerSpec, "learners", f"ablate/{path.stem}")
    defaults = load(None)
    changed = [(s, k) for s, v in spec.settings.items() for k, x in v.items() if getattr(getattr(defaults, s), k) != x]
    assert spec.kind == "cycle"
    assert len(changed) == sum(len(v) for v in spec.settings.values()), "a setting that is the default ablates nothing"
    assert len(changed) == TOGETHER.get(path.stem, 1)


@pytest.mark.parametrize("percent", [0, 5, 25])
def test_an_ablation_of_anchors_has_the_share_of_its_name(percent: int) -> None:
    learn = read_spec(LearnerSpec, "learners", f"ablate/anchors_{percent}").configured(load(None)).learn
    mixture = Mixture(learn.lam, learn.epsilon, 0)
    counts = [mixture.counts(learn.batch_traces, step) for step in range(1000)]
    assert sum(c.anchors for c in counts) / (1000 * learn.batch_traces) == pytest.approx(percent / 100, abs=0.001)


def test_steps_follow_the_cadence() -> None:
    default = load(None).learn
    for name in ("every_16", "every_64"):
        learn = read_spec(LearnerSpec, "learners", f"ablate/{name}").configured(load(None)).learn
        assert learn.steps_per_tick / learn.min_new_traces == default.steps_per_tick / default.min_new_traces


def test_more_target_tokens_than_are_captured_are_refused_before_anything_runs() -> None:
    spec = read_spec(LearnerSpec, "learners", "offline/top_64")
    with pytest.raises(ConfigError, match=r"top_64: k_top \(64\) must be at most the 32 .*--set capture.k_top=64"):
        spec.require(load(None))
    spec.require(load(None, ["capture.k_top=64"]))


def test_settings_that_contradict_each_other_name_the_learner() -> None:
    spec = LearnerSpec(name="mine", kind="cycle", settings={"learn": {"objective": "acceptance_length"}})
    spec.require(load(None))
    with pytest.raises(ConfigError, match=r"learner mine: .*acceptance_length needs every position"):
        spec.require(load(None, ["capture.positions=rejected"]))
