"""The shipped held-out prompts."""

from __future__ import annotations

import gzip
import json
from importlib.resources import files
from pathlib import Path


def pocket_prompts(domain: str) -> list[str]:
    """The prompts of one domain: medical, math, tools or code."""
    path = Path(str(files("adaptd.pocket"))) / "prompts" / f"{domain}.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line)["prompt"] for line in lines]
