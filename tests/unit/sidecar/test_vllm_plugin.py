"""The plugin in a server's environment: found by its entry point, and harmless everywhere."""

import subprocess
import sys
import tomllib
from pathlib import Path

from adaptd.sidecar.vllm_plugin import BACKEND, register

ROOT = Path(__file__).parents[3]
#: What a server's environment does not have.
OURS = ("ray", "redis", "peft", "typer", "structlog", "pydantic_settings", "apscheduler", "httpx", "transformers")


def test_the_entry_point_names_a_function_that_exists() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["vllm.general_plugins"] == {"adaptd": f"{register.__module__}:{register.__name__}"}


def test_registering_without_vllm_does_nothing() -> None:
    register()
    register()
    assert not any(name.partition(".")[0] == "vllm" for name, module in sys.modules.items() if module is not None)


def test_the_plugin_and_its_checks_need_nothing_that_vllm_does_not_ship() -> None:
    """Blocks adaptd's own dependencies: an import of one would stop the server's plugin from loading."""
    code = (
        "import sys\n"
        f"for name in {OURS!r}: sys.modules[name] = None\n"
        "import adaptd.sidecar.vllm_plugin as plugin\n"
        "assert 'torch' not in sys.modules\n"
        "import adaptd.sidecar.vllm_update\n"
        "plugin.register()\n"
        "print('fine')"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert found.stdout.strip() == "fine", found.stderr


def test_it_registers_once_in_a_process_that_loads_its_plugins_twice() -> None:
    code = (
        "import sys, types\n"
        "class Factory:\n"
        "    seen = {}\n"
        "    @classmethod\n"
        "    def register_engine(cls, name, module, attribute):\n"
        "        if name in cls.seen: raise ValueError('already registered')\n"
        "        cls.seen[name] = (module, attribute)\n"
        "for name in ('vllm', 'vllm.distributed', 'vllm.distributed.weight_transfer'):\n"
        "    sys.modules[name] = types.ModuleType(name)\n"
        "factory = types.ModuleType('vllm.distributed.weight_transfer.factory')\n"
        "factory.WeightTransferEngineFactory = Factory\n"
        "sys.modules[factory.__name__] = factory\n"
        "from adaptd.sidecar.vllm_plugin import register\n"
        "register(); register()\n"
        "print(Factory.seen)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert eval(found.stdout) == {BACKEND: ("adaptd.sidecar.vllm_backend", "DiskWeightTransferEngine")}
