"""Training text and request prompts of the pocket family, from sources whose licence allows shipped weights.

Every record is one single-turn exchange. `train` records teach the tokenizer and the target; `test` records become the
held-out request prompts that ship in the wheel. Nothing else is read: files that are for evaluation only are not named.
"""

from __future__ import annotations

import ast
import gzip
import hashlib
import json
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

DOMAINS = ("medical", "math", "tools", "code")

#: Files by domain and split; each is gzip-compressed JSON Lines with `prompt` and `response`.
SOURCES: dict[str, dict[str, tuple[str, ...]]] = {
    "medical": {"train": ("medquad.train",), "test": ("medquad.test",)},
    "math": {"train": ("gsm8k.train", "aqua_rat.train"), "test": ("gsm8k.test", "aqua_rat.test")},
    "tools": {
        "train": ("bfcl.train", "glaive_toolcall_en.train", "apibench.train"),
        "test": ("bfcl.test", "glaive_toolcall_en.test"),
    },
}

#: Standard library packages whose text is not ordinary code (test data, generated tables, user interfaces).
_STDLIB_SKIPPED = {
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "turtledemo",
    "site-packages",
    "ensurepip",
    "pydoc_data",
    "encodings",
}
_CODE_TEST_SHARE = 0.1


class Exchange(NamedTuple):
    """One request and its reference answer."""

    domain: str
    prompt: str
    response: str


def load_exchanges(data: Path, split: str, seed: int) -> list[Exchange]:
    """All exchanges of one split over the four domains, shuffled with `seed`.

    Args:
      data: folder that holds `<source>.<split>.jsonl.gz`.
      split: `train` or `test`.
      seed: seed of the shuffle.

    Raises:
      FileNotFoundError: a source file is missing; the message names it.
    """
    exchanges: list[Exchange] = []
    for domain, splits in SOURCES.items():
        for name in splits[split]:
            exchanges.extend(_read(data / f"{name}.jsonl.gz", domain))
    exchanges.extend(stdlib_functions(split))
    random.Random(seed).shuffle(exchanges)
    return exchanges


def _read(path: Path, domain: str) -> Iterator[Exchange]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: --data must be the folder with the source files")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            if row["response"]:
                prompt = _shorten_tools(row["prompt"], row["response"]) if domain == "tools" else row["prompt"]
                yield Exchange(domain, prompt, row["response"])


def _shorten_tools(prompt: str, response: str) -> str:
    """Keep the functions that the answer calls and one more, without their per-argument descriptions.

    Function lists run to thousands of characters, more than the pocket context holds.
    """
    kept: list[str] = []
    spare = 1
    for line in prompt.split("\n"):
        function = _function(line)
        if function is None:
            kept.append(line)
        elif f'"{function["name"]}"' in response or spare > 0:
            spare -= f'"{function["name"]}"' not in response
            kept.append(_signature(function))
    return "\n".join(kept)


def _function(line: str) -> dict[str, object] | None:
    if not line.startswith('{"name"'):
        return None
    try:
        value = json.loads(line)
    except json.JSONDecodeError:
        return None
    return value if isinstance(value, dict) else None


def _signature(function: dict[str, object]) -> str:
    parameters = function.get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, dict) else None
    arguments = {}
    if isinstance(properties, dict):
        arguments = {k: v.get("type", "any") if isinstance(v, dict) else "any" for k, v in properties.items()}
    return json.dumps(
        {"name": function["name"], "description": function.get("description", ""), "arguments": arguments},
        ensure_ascii=False,
    )


def stdlib_functions(split: str) -> Iterator[Exchange]:
    """Documented functions of this interpreter's standard library: docstring to source.

    A function belongs to `test` by a hash of its module's name, so that no module is in both splits.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _STDLIB_SKIPPED.intersection(relative.parts):
            continue
        digest = hashlib.sha256(str(relative).encode()).digest()
        if (digest[0] / 256 < _CODE_TEST_SHARE) != (split == "test"):
            continue
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (SyntaxError, UnicodeDecodeError):
            continue
        yield from _functions(tree)


def _functions(tree: ast.Module) -> Iterator[Exchange]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or len(node.body) < 2:
            continue
        doc = ast.get_docstring(node)
        if not doc or len(doc) < 20:
            continue
        node.body = node.body[1:]
        summary = " ".join(doc.split("\n\n")[0].split())
        prompt = f"Write the Python function {node.name}({', '.join(a.arg for a in node.args.args)}). {summary}"
        # ast.unparse drops comments and normalises layout: one style for so small a model to learn.
        yield Exchange("code", prompt, ast.unparse(node))
