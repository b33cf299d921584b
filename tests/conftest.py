"""How tests are shared out between processes (`pytest -n 2 --dist loadgroup`)."""

import os
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
#: Start clusters, servers, browsers: one at a time, in one process.
ALONE = ("browser", "integration")

if "PYTEST_XDIST_WORKER" in os.environ:
    # Two processes of two threads each would wait for each other on two cores.
    torch.set_num_threads(1)


# First of all: pytest-xdist reads the groups when it collects.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of one file stay together, since they share fixtures; those of whole systems stay in one process."""
    for item in items:
        path = item.path.relative_to(HERE)
        alone = path.parts[0] in ALONE or item.get_closest_marker("ray") is not None
        item.add_marker(pytest.mark.xdist_group("systems" if alone else str(path)))
