"""The pocket pair, loaded once."""

import gzip
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch

from adaptd.config import Config, load
from adaptd.models import load as models
from adaptd.models.chat import render_chat

DOMAINS = ("medical", "math", "tools", "code")


@pytest.fixture(scope="session")
def pocket_target() -> Any:
    torch.set_num_threads(2)
    return models.load_causal_lm(models.resolve("pocket", "target"), dtype="float32", device="cpu")


@pytest.fixture
def pocket_draft() -> Any:
    return models.load_causal_lm(models.resolve("pocket", "draft"), dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def pocket_tokenizer() -> Any:
    return models.load_tokenizer(models.resolve("pocket", "target"))


@pytest.fixture(scope="session")
def pocket_prompts(pocket_tokenizer: Any) -> dict[str, list[list[int]]]:
    """Token ids of the shipped prompts, by domain."""
    folder = Path(str(files("adaptd.pocket"))) / "prompts"
    found = {}
    for domain in DOMAINS:
        with gzip.open(folder / f"{domain}.jsonl.gz", "rt") as lines:
            prompts = [json.loads(line)["prompt"] for line in lines]
        found[domain] = [render_chat(pocket_tokenizer, [{"role": "user", "content": p}]) for p in prompts]
    return found


@pytest.fixture
def settings(tmp_path: Path) -> Config:
    return load(None, [f"state_dir={tmp_path}", "server.port=0", "engine.max_length=320", "log.style=json"])
