"""The compiled pass is the one in Python, to rounding; without a compiler everything runs as before."""

import copy
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from adaptd.decoding.runner import ModelRunner
from adaptd.models import compiled
from adaptd.models.compiled import kernels, stored_product
from adaptd.models.native import MOST_POSITIONS
from adaptd.models.packed import Packed, PackedLinear, can_pack, pack_linears
from adaptd.models.scope import AdaptedDraft, ScopeConfig
from tests.unit.models.test_lean import CASES, model

needs_compiler = pytest.mark.skipif(kernels() is None, reason="no C++ compiler")
BOTH = [torch.float32, torch.bfloat16]


def runners(whole: nn.Module, **sizes: int) -> tuple[ModelRunner, ModelRunner]:
    """One that runs compiled code and one that does not."""
    settings: dict[str, Any] = {"slots": 3, "capacity": 160, "max_length": 128} | sizes
    found = ModelRunner(whole, **settings), ModelRunner(whole, **settings, compiled=False)
    assert found[0]._lean._native is not None
    assert found[1]._lean._native is None
    return found


@torch.inference_mode()
def answers(runner: ModelRunner, batch: int, prompt: int, behind: list[list[int]]) -> list[Tensor]:
    """Logits of prompts, of further tokens of each row at its own positions, and of their last alone."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 128, (batch, prompt), generator=generator)
    start = torch.arange(prompt).expand(batch, prompt)
    positions = torch.tensor(behind)
    length = 32 * (int(positions.max()) // 32 + 1)
    fed = torch.randint(0, 128, positions.shape, generator=generator)
    first = runner.forward(tokens, start, runner.masks(start, 128), 0, 128, last_only=True)
    masks = runner.masks(positions, length)
    then = [runner.forward(fed, positions, masks, 0, length, last_only=last) for last in (False, True)]
    return [first, *then]


def check(native: list[Tensor], python: list[Tensor], exact: list[Tensor] | None = None) -> None:
    """The same but for the order of summation; in bfloat16, no further from what float32 gives than Python is."""
    if exact is None:
        for got, right in zip(native, python, strict=True):
            torch.testing.assert_close(got, right, atol=2e-5 * float(right.abs().max()), rtol=0)
        return
    errors = [sum(float((a - b).abs().mean()) for a, b in zip(found, exact, strict=True)) for found in (native, python)]
    assert errors[0] < 1.5 * errors[1]


@needs_compiler
@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("pack", [False, True], ids=["as they are", "packed"])
@pytest.mark.parametrize("name", [name for name in CASES if name != "another activation"])
def test_the_same_logits(name: str, pack: bool, dtype: torch.dtype) -> None:
    whole = model(name).to(dtype)
    exact = copy.deepcopy(whole).float()
    if pack:
        pack_linears(whole, rows=5)
    behind = [[40, 41, 42], [11, 12, 13], [99, 100, 101]]
    got, right, truth = (answers(runner, 3, 100, behind) for runner in (*runners(whole), runners(exact)[1]))
    check(got, right, truth if dtype is torch.bfloat16 else None)


@needs_compiler
@pytest.mark.parametrize("size", [{"head_dim": 20}, {"intermediate_size": 437}, {"hidden_size": 264, "head_dim": 32}])
def test_sizes_that_are_no_multiple_of_a_vector(size: dict[str, int]) -> None:
    whole = model("qwen3", **size)
    behind = [[5, 6], [12, 13]]
    check(*(answers(runner, 2, 14, behind) for runner in runners(whole)))


@needs_compiler
@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("gate", [True, False])
def test_an_adapted_draft_and_a_swap(gate: bool, dtype: torch.dtype) -> None:
    base = model("llama").to(dtype)
    scope = ScopeConfig(width=24, head_rank=8, request_gate=gate, gated=gate)
    drafts = [AdaptedDraft(copy.deepcopy(base).to(kind), scope, serving=True) for kind in (dtype, torch.float32)]
    three = *runners(drafts[0].model), runners(drafts[1].model)[1]
    behind = [[20, 21], [11, 12], [16, 17]]
    found: tuple[list[Tensor], ...] = ([], [], [])
    for seed in (2, 3):
        generator = torch.Generator().manual_seed(seed)
        learned = {n: 0.1 * torch.randn(t.shape, generator=generator) for n, t in drafts[0].state().items()}
        for draft in drafts:
            draft.load(learned)
        for runner, seen in zip(three, found, strict=True):
            runner._openness = torch.tensor([0.0, 0.5, 2.0])[:, None, None] if gate else None
            seen += answers(runner, 3, 24, behind)
    check(found[0], found[1], found[2] if dtype is torch.bfloat16 else None)
    assert not torch.allclose(found[0][1], found[0][4], atol=0.1), "what was swapped in acts"


@needs_compiler
def test_a_row_s_logits_do_not_depend_on_the_rows_beside_it() -> None:
    """To the last bit: while a pass has few rows, each is summed in one order."""
    whole = model("llama")
    pack_linears(whole, rows=5)
    behind = [[20, 21, 22], [11, 12, 13], [16, 17, 18], [9, 10, 11]]
    runner, _ = runners(whole, slots=4)
    together = answers(runner, 4, 24, behind)[1]
    generator = torch.Generator().manual_seed(1)
    torch.randint(0, 128, (4, 24), generator=generator)
    fed = torch.randint(0, 128, (4, 3), generator=generator)
    with torch.inference_mode():
        for row, at in enumerate(behind):
            positions = torch.tensor([at])
            alone = runner.forward(fed[row : row + 1], positions, runner.masks(positions, 32), row, 32, last_only=False)
            assert torch.equal(alone[0], together[row])


@needs_compiler
@pytest.mark.parametrize("dtype", BOTH)
def test_what_is_verified_is_what_plain_decoding_computes(dtype: torch.dtype) -> None:
    """To the last bit: positions judged in one pass have the logits that each has in a pass of its own."""
    whole = model("llama").to(dtype)
    pack_linears(whole, rows=5, compiled=True)
    if whole.model.layers[0].self_attn.q_proj.packed.layout != "stored":
        pytest.skip("oneDNN's layout is taken here, whose products are another library's")
    runner, _ = runners(whole)
    answers(runner, 1, 8, [[8]])
    fed, positions = torch.arange(20, 25)[None], torch.arange(50, 55)[None]
    with torch.inference_mode():
        at_once = runner.forward(fed, positions, runner.masks(positions, 64), 0, 64, last_only=False)
        for i in range(5):
            one = positions[:, i : i + 1]
            alone = runner.forward(fed[:, i : i + 1], one, runner.masks(one, 64), 0, 64, last_only=True)
            assert torch.equal(alone[0, 0], at_once[0, i])


@needs_compiler
def test_a_long_pass_and_the_first_one_are_python_s() -> None:
    whole = model("llama")
    runner, _ = runners(whole)
    native = runner._lean._native
    few, many = torch.zeros(1, MOST_POSITIONS, dtype=torch.long), torch.zeros(1, MOST_POSITIONS + 1, dtype=torch.long)
    assert not native.takes(few, runner.cache), "keys and values have no place yet"
    answers(runner, 1, 8, [[8]])
    assert native.takes(few, runner.cache)
    assert not native.takes(many, runner.cache)


@needs_compiler
@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("bias", [False, True])
def test_the_product_with_a_stored_weight(bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for size, out in ((64, 32), (70, 33), (7, 3), (1000, 129), (960, 200)):
        weight = torch.randn(out, size + 8).to(dtype)[:, :size]
        given = torch.randn(out).to(dtype) if bias else None
        for shape in ((1,), (2, 3), (16,), (17,), (40,), (3, 50), (0,)):
            x = torch.randn(*shape, size).to(dtype)
            right = linear(x.double(), weight.double(), None if given is None else given.double())
            got = stored_product(x, weight, given)
            assert got.dtype is dtype
            assert got.shape == right.shape
            if right.numel():
                tolerance = {torch.float32: 1e-6, torch.bfloat16: 8e-3}[dtype] * float(right.abs().max())
                torch.testing.assert_close(got.double(), right, atol=tolerance, rtol=0)


@needs_compiler
@pytest.mark.skipif(not can_pack(torch.bfloat16), reason="no bfloat16 in oneDNN's kernels")
def test_between_products_of_onednn() -> None:
    """Both may use the processor's matrix unit, whose settings a thread keeps from one product to the next."""
    torch.manual_seed(0)
    layers = [nn.Linear(384, 256, bias=False).bfloat16().requires_grad_(False) for _ in range(2)]
    packed = [Packed([layer], 5) for layer in layers]
    x = torch.randn(5, 384).bfloat16()
    right = [layer(x) for layer in layers]
    for _ in range(5):
        for i in range(2):
            theirs, ours = packed[i].product(x, first=True, last=True), stored_product(x, layers[1 - i].weight, None)
            torch.testing.assert_close(theirs, right[i], atol=0.02, rtol=0.02)
            torch.testing.assert_close(ours, right[1 - i], atol=0.02, rtol=0.02)


@needs_compiler
def test_of_a_small_model_the_stored_weights_are_read_by_the_compiled_product() -> None:
    whole = model("llama")
    assert pack_linears(whole, rows=5) > 0
    layer = whole.model.layers[0].self_attn.q_proj
    assert isinstance(layer, PackedLinear)
    assert layer.packed.layout == "stored"
    assert layer.packed.kernel is stored_product
    other = model("llama")
    if can_pack(torch.float32):
        assert pack_linears(other, rows=5, compiled=False) > 0
        assert other.model.layers[0].self_attn.q_proj.packed.layout == "onednn"


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A machine on which nothing has been compiled."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kernels.cache_clear()
    yield tmp_path / "adaptd" / "kernels"
    kernels.cache_clear()


@pytest.mark.parametrize("how", ["none", "fails", "makes nothing that loads"])
def test_without_a_compiler_it_is_said_once_and_python_runs(
    fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    script = tmp_path / "cxx"
    lines = {"fails": "echo 'decoder.cpp:1: error: no' >&2; exit 1", "makes nothing that loads": 'touch "${@: -1}"'}
    if how == "none":
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setattr(compiled.shutil, "which", lambda _: None)
    else:
        after = "\n".join(['while [ "$1" != -o ]; do shift; done; touch "$2"'] if "loads" in how else [lines[how]])
        script.write_text(f"#!/bin/bash\n{after}\n")
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("CXX", str(script))
    with structlog.testing.capture_logs() as logs:
        assert kernels() is None
        runner = ModelRunner(model("llama"), slots=1, capacity=64, max_length=60)
    assert runner._lean._native is None
    warnings = [line for line in logs if line["log_level"] == "warning"]
    assert [line["event"] for line in warnings] == ["kernels.missing"]
    assert "CXX" in warnings[0]["remedy"]
    if how == "fails":
        assert warnings[0]["error"].endswith("failed with 1: decoder.cpp:1: error: no")
        assert not list(fresh.glob("*.so"))


def test_two_processes_compile_once(fresh: Path, tmp_path: Path) -> None:
    """The second waits for the first and takes what it made; what a killed compiler left is no library."""
    script, count = tmp_path / "cxx", tmp_path / "count"
    script.write_text(
        f'#!/bin/bash\necho x >> {count}\nsleep 1\nwhile [ "$1" != -o ]; do shift; done\necho library > "$2"\n'
    )
    script.chmod(0o755)
    code = "from adaptd.models.compiled import library; print(library())"
    environment = os.environ | {"CXX": str(script)}
    both = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    found = {process.communicate()[0].splitlines()[-1] for process in both}
    assert len(found) == 1
    assert Path(found.pop()).read_text() == "library\n"
    assert count.read_text() == "x\n"
