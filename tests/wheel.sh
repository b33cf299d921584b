#!/usr/bin/env bash
# The built wheel in a clean environment: it must hold everything that --help and the demonstration need.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
.venv/bin/pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir "$work/dist" .
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check --constraint constraints.txt torch
"$work/venv/bin/pip" install --quiet --disable-pip-version-check --constraint constraints.txt "$work"/dist/*.whl
cd "$work"
"$work/venv/bin/adaptd" --help >/dev/null
# What a vLLM server finds and calls; without vLLM it does nothing.
"$work/venv/bin/python" -c "
from importlib.metadata import entry_points
(plugin,) = entry_points(group='vllm.general_plugins', name='adaptd')
plugin.load()()
"
# Its sources of compiled code, where this machine has a compiler.
if command -v g++ >/dev/null; then
  "$work/venv/bin/python" -c "from adaptd.models.compiled import library; print(library())"
fi
"$work/venv/bin/adaptd" demo --quick --json "$work/demo.json"
"$work/venv/bin/python" - "$work/demo.json" <<'PY'
import json, sys
phases = json.load(open(sys.argv[1]))["phases"]
assert [p["domain"] for p in phases] == ["medical", "math", "tools", "medical"], phases
assert all(p["requests"] > 0 and p["frozen"]["last_100_mal"] for p in phases), phases
print("wheel: adaptd demo --quick passed")
PY
