"""Doctor's word on the compiled kernels."""

from pathlib import Path

import pytest

from adaptd.app import doctor
from adaptd.config import load
from adaptd.models.compiled import kernels


@pytest.mark.skipif(kernels() is None, reason="no C++ compiler")
def test_kernels_are_named_where_they_are() -> None:
    (check,) = doctor._kernels(load(None, []))
    assert check.state == "ok"
    assert Path(check.found.removeprefix("compiled: ")).is_file()


def test_a_machine_without_a_compiler_is_warned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "/nowhere/c++ -m64")
    (check,) = doctor._kernels(load(None, []))
    assert check.state == "warning"
    assert "/nowhere/c++" in check.found
    assert "engine.compiled" in check.remedy


@pytest.mark.parametrize("setting", ["engine.compiled=false", "engine.kind=vllm"])
def test_who_needs_none_is_not_asked(setting: str) -> None:
    assert not list(doctor._kernels(load(None, [setting])))
