"""Configuration: precedence, and errors that name key, value and remedy."""

from pathlib import Path

import pytest

from adaptd import config
from adaptd.errors import ConfigError

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_every_shipped_file_loads(path: Path) -> None:
    assert config.load(path).deployment


def test_set_beats_environment_beats_file_beats_default(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("engine: {k: 2, max_batch: 2, max_queue: 2}\n")
    found = config.load(path, ["engine.k=5"], {"ADAPTD_ENGINE__K": "3", "ADAPTD_ENGINE__MAX_BATCH": "3"})
    assert (found.engine.k, found.engine.max_batch, found.engine.max_queue) == (5, 3, 2)
    assert found.engine.decoders == config.EngineConfig().decoders


def test_top_level_keys_come_from_the_environment_too() -> None:
    assert config.load(environ={"ADAPTD_DEPLOYMENT": "blue"}).deployment == "blue"


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("learn.obective=tv", "unknown configuration key 'learn.obective'; the nearest is 'learn.objective'"),
        ("lern.lr=1", "unknown configuration key 'lern'; the nearest is 'learn'"),
        ("engine={kind: vllm, draft_length: auto}", "draft_length .'auto'. is the native engine's"),
        ("engine.k=99", r"'engine.k' = 99: .* less than or equal to 16"),
        ("learn.objective=kl", r"'learn.objective' = 'kl'"),
        ("learn.rejection_weight=0", r"'learn.rejection_weight' = 0: .* greater than 0"),
        ("learn.priority=lost", r"'learn.priority' = 'lost': .*'overlap'"),
        ("nonsense", "must have the form section.key=value"),
        ("deployment=A B", "deployment"),
    ],
)
def test_a_bad_setting_is_refused_by_name(item: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.load(None, [item])


def test_recall_without_any_source_is_refused_and_switched_off_is_not() -> None:
    with pytest.raises(ConfigError, match=r"orders and echo are both empty.*recall.enabled"):
        config.load(None, ["recall.orders=[]", "recall.echo=[]"])
    assert not config.load(None, ["recall.orders=[]", "recall.echo=[]", "recall.enabled=false"]).recall.enabled


def test_only_decoders_of_its_own_are_asked_again() -> None:
    with pytest.raises(ConfigError, match=r"capture.again \(2\) is for decoders of adaptd's own.*set it to 0"):
        config.load(None, ["capture.again=2", "engine.kind=vllm"])
    assert config.load(None, ["capture.again=2"]).capture.again == 2


def test_an_objective_over_blocks_is_refused_where_corrections_alone_are_captured() -> None:
    with pytest.raises(ConfigError, match=r"acceptance_length needs every position.*capture.positions is 'rejected'"):
        config.load(None, ["learn.objective=acceptance_length", "capture.positions=rejected"])
    assert config.load(None, ["learn.objective=acceptance_length"]).capture.positions == "all"
    assert config.load(None, ["learn.objective=tv", "capture.positions=rejected"]).learn.objective == "tv"


def test_a_file_that_is_missing_or_no_mapping_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        config.load(tmp_path / "none.yaml")
    path = tmp_path / "list.yaml"
    path.write_text("- 1\n")
    with pytest.raises(ConfigError, match="mapping"):
        config.load(path)
    path.write_text("a: [\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        config.load(path)


def test_nothing_can_write_into_a_configuration() -> None:
    with pytest.raises(ValueError, match="frozen"):
        config.load().engine.k = 3  # type: ignore[misc]


def test_the_admin_token_is_not_printed() -> None:
    found = config.load(None, ["server.admin_token=hush"])
    assert "hush" not in repr(found) + str(found.model_dump(mode="json"))


def test_the_readme_lists_every_setting() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text()
    missing = [key for key, _, _ in config.settings() if f"`{key}`" not in text]
    assert not missing, "run `make docs`"
