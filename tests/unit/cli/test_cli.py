"""The command line: exit codes and messages, run as a program."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = [sys.executable, "-m", "adaptd.cli.main"]


def run(home: Path, *args: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "ADAPTD_STATE_DIR": str(home)}
    return subprocess.run([*COMMAND, *args], env=env, capture_output=True, text=True, timeout=120, check=False)


def test_status_says_plainly_that_no_daemon_runs(tmp_path: Path) -> None:
    found = run(tmp_path, "status")
    assert found.returncode == 69
    assert "no adaptd daemon runs" in found.stderr
    assert "adaptd serve" in found.stderr
    assert run(tmp_path, "report", "--out", str(tmp_path / "out")).stderr == found.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["serve", "--set", "engine.kk=3"], 78, "the nearest is 'engine.k'"),
        (["serve", "--config", "/nonexistent.yaml"], 78, "cannot be read"),
        (["frobnicate"], 2, "No such command"),
        (["status", "--since", "7 parsecs"], 2, "such as 7d"),
        (["report", "--since", "2999-01-01"], 2, "must lie in the past"),
        (["serve", "--set", "trends.groups={units: '['}"], 78, "no regular expression"),
        (["eval", "/nonexistent.jsonl"], 1, "cannot be read"),
    ],
)
def test_bad_input_ends_with_one_line_and_its_exit_code(
    tmp_path: Path, args: list[str], code: int, message: str
) -> None:
    found = run(tmp_path, *args)
    assert found.returncode == code
    assert message in found.stderr
    assert "Traceback" not in found.stderr


def test_an_unwritable_state_dir_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = run(tmp_path / "file", "serve", "--set", "server.port=0")
    assert found.returncode == 78
    assert "cannot be written" in found.stderr
    assert "state_dir" in found.stderr


def test_a_port_in_use_is_refused_before_anything_is_started(tmp_path: Path) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        found = run(tmp_path, "serve", "--set", f"server.port={taken.getsockname()[1]}")
    assert found.returncode == 1
    assert "server.port" in found.stderr


def test_dry_run_prints_the_resolved_configuration(tmp_path: Path) -> None:
    found = run(tmp_path, "serve", "--dry-run", "--set", "engine.k=7")
    assert json.loads(found.stdout)["engine"]["k"] == 7


def test_checkpoints_of_an_empty_store(tmp_path: Path) -> None:
    assert json.loads(run(tmp_path, "checkpoints", "list", "--json").stdout) == {"current": None, "versions": []}
    gone = run(tmp_path, "checkpoints", "show", "3")
    assert gone.returncode == 1
    assert "3" in gone.stderr
    nothing = run(tmp_path, "checkpoints", "rollback")
    assert nothing.returncode == 1
    assert "Traceback" not in nothing.stderr


PLAIN = ("--set", "adapt.gated=false", "--set", "adapt.head_rank=0", "--set", "adapt.embed_rank=0")


def test_export_prepares_a_draft_for_an_engine_with_fixed_shapes(tmp_path: Path) -> None:
    found = run(tmp_path, "export", "--prepare", str(tmp_path / "out"), "--json", *PLAIN)
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["prepared"] is True
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    base = json.loads((Path(__file__).parents[3] / "adaptd" / "pocket" / "draft" / "config.json").read_text())
    assert config["intermediate_size"] == base["intermediate_size"] + 128
    assert config["tie_word_embeddings"] is False
    again = run(tmp_path, "export", "--prepare", str(tmp_path / "out"), *PLAIN)
    assert again.returncode == 1
    assert "not an empty folder" in again.stderr


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["--prepare", "OUT"], 78, "adapt.gated: false, adapt.head_rank: 0, adapt.embed_rank: 0"),
        (["0", "OUT"], 78, "gated: false"),
        (["7", "OUT", *PLAIN], 1, "version 7 is not in"),
        (["--prepare", "0", "OUT"], 2, "leave the version out"),
        (["first", "OUT"], 2, "must be a number"),
    ],
)
def test_what_cannot_be_exported_is_said_plainly(tmp_path: Path, args: list[str], code: int, message: str) -> None:
    out = tmp_path / "out"
    found = run(tmp_path, "export", *(str(out) if arg == "OUT" else arg for arg in args))
    assert found.returncode == code, found.stderr
    assert message in " ".join(found.stderr.split())
    assert "Traceback" not in found.stderr
    assert not out.exists()


def test_a_version_that_live_traffic_refused_is_shown_and_promoted_by_force_alone(tmp_path: Path) -> None:
    import torch

    from adaptd.learning.quarantine import take_back
    from checkpoints.store import CheckpointStore

    store = CheckpointStore(tmp_path / "default" / "checkpoints")
    for value in (1.0, 2.0):
        about: dict[str, dict[str, str]] = {"gate": {}, "window": {}, "config": {}, "scope_config": {}}
        store.publish({"w": torch.tensor([value])}, base_id="b", tokenizer_hash="t", scope="lora", **about)
    take_back(store, 1, [2], "acceptance fell")
    listed = json.loads(run(tmp_path, "checkpoints", "list", "--json").stdout)["versions"]
    assert [bool(row["quarantine"]) for row in listed] == [False, True, False]
    assert "quarantined" in run(tmp_path, "checkpoints", "list").stdout
    shown = json.loads(run(tmp_path, "checkpoints", "show", "2", "--json").stdout)
    assert "acceptance fell" in shown["quarantine"]
    refused = run(tmp_path, "checkpoints", "promote", "2")
    assert refused.returncode == 1
    assert "version 2 is quarantined" in refused.stderr
    assert "--force" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert store.current() == 3
    forced = run(tmp_path, "checkpoints", "promote", "2", "--force")
    assert forced.returncode == 0, forced.stderr
    assert "tensors of version 2" in forced.stdout
    assert store.current() == 4
