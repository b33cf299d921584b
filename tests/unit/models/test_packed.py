"""Packed layers compute what the layers they replace compute."""

import copy
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import nn

from adaptd.decoding.engine import SpeculativeDecoder
from adaptd.decoding.request import DecodeRequest, SamplingParams
from adaptd.models import packed as packed_module
from adaptd.models.load import weights_id
from adaptd.models.packed import Layout, Packed, PackedLinear, can_pack, fastest_layout, pack_linears
from tests.unit.decoding.tiny import greedy_reference, make_draft, make_model, make_prompts, serve

needs_kernels = pytest.mark.skipif(not can_pack(torch.float32), reason="a torch build without oneDNN")
BOTH = [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.skipif(not can_pack(torch.bfloat16), reason=""))]


@needs_kernels
@pytest.mark.parametrize("layout", get_args(Layout))
@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("bias", [False, True])
def test_any_rows_any_strides(dtype: torch.dtype, bias: bool, layout: Layout) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(384, 200, bias=bias).to(dtype).requires_grad_(False)
    packed = PackedLinear(layer, Packed([layer], 5, layout), 0, last=True)
    assert torch.equal(packed.weight, layer.weight)
    inputs = [torch.randn(*shape, 384).to(dtype) for shape in ((1, 1), (3, 5), (7,), (2, 90))]
    inputs += [torch.randn(384, 6).to(dtype).T, torch.randn(4, 9, 384).to(dtype)[:, 2:5]]
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.02}[dtype]
    for x in inputs:
        torch.testing.assert_close(packed(x), layer(x), atol=tolerance, rtol=tolerance)


@needs_kernels
def test_greedy_output_of_a_packed_target_is_transformers_own() -> None:
    target = make_model("llama", hidden_size=256, intermediate_size=300, head_dim=64, initializer_range=0.1)
    target.requires_grad_(False)
    prompts = make_prompts(12, 97)
    answers = greedy_reference(target, prompts, 14)
    packed = copy.deepcopy(target)
    assert pack_linears(packed, rows=4) == 2 * 7
    assert pack_linears(packed, rows=4) == 0
    assert weights_id(packed) == weights_id(target)
    engine = SpeculativeDecoder(packed, make_draft(target, noise=0.004), k=3, max_batch=4, max_length=80)
    requests = [DecodeRequest(str(i), p, SamplingParams(temperature=0.0, max_tokens=14)) for i, p in enumerate(prompts)]
    done = serve(engine, requests)
    assert [list(done[str(i)].token_ids) for i in range(12)] == answers


@needs_kernels
@pytest.mark.parametrize(
    ("stored_s", "packed_s", "expected", "compiled"),
    [(1.0, 2.0, "stored", "stored"), (1.0, 1.05, "onednn", "stored"), (1.2, 1.0, "onednn", "onednn")],
)
def test_of_a_large_model_the_faster_layout_is_taken_and_a_small_one_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, stored_s: float, packed_s: float, expected: Layout, compiled: Layout
) -> None:
    """On a clock that the products move."""
    clock = [0.0]

    def costing(seconds: float, product: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def found(*args: Any) -> torch.Tensor:
            clock[0] += seconds
            return product(*args)

        return found

    stored = costing(stored_s, packed_module.linear)
    monkeypatch.setattr(packed_module, "linear", stored)
    monkeypatch.setattr(packed_module, "_packed_product", costing(packed_s, packed_module._packed_product))
    monkeypatch.setattr(packed_module.time, "perf_counter", lambda: clock[0])
    layers = [nn.Linear(300, 400, bias=False).requires_grad_(False) for _ in range(3)]
    model = nn.Sequential(*layers)
    x = torch.randn(5, 300)
    assert fastest_layout([layers], 5, stored) == "onednn"
    assert clock == [0.0]
    monkeypatch.setattr(packed_module, "_TIMED_BYTES", 2 * 300 * 400 * 4)
    groups = [[layer] for layer in layers]
    assert fastest_layout(groups, 5, stored) == expected
    assert clock[0] == pytest.approx(4 * 2 * (stored_s + packed_s)), "two of three layers, four times each"
    other = costing(stored_s, torch.nn.functional.linear)
    assert fastest_layout(groups, 5, other) == compiled, "where both take as long, a row's sum is its own"
    assert pack_linears(model, rows=5, compiled=False) == 3
    for layer, replaced in zip(layers, model, strict=True):
        assert isinstance(replaced, PackedLinear)
        assert replaced.packed.layout == expected
        assert torch.equal(replaced.weight, layer.weight)
        torch.testing.assert_close(replaced(x), layer(x), atol=1e-5, rtol=1e-5)


@needs_kernels
def test_siblings_are_one_product_for_one_input_and_right_for_any() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.k_proj = nn.Linear(256, 256), nn.Linear(256, 64)
            self.v_proj = nn.Linear(256, 64)

    torch.manual_seed(0)
    model = Attention().requires_grad_(False)
    dense = copy.deepcopy(model)
    assert pack_linears(model, rows=5) == 3
    names = ("q_proj", "k_proj", "v_proj")
    for order in (names, names[::-1], ("k_proj", "v_proj", "q_proj", "q_proj")):
        x, other = torch.randn(2, 5, 256), torch.randn(3, 256)
        for name in order:
            for value in (x, other, x):
                got, right = (m.get_submodule(name)(value) for m in (model, dense))
                torch.testing.assert_close(got, right, atol=1e-5, rtol=1e-5)
    packed = model.q_proj.packed
    calls = []
    kernel = packed.kernel
    packed.kernel = lambda *args: calls.append(1) or kernel(*args)
    for _ in range(2):
        x.copy_(torch.randn(2, 5, 256))  # the same tensor with other values, a round later
        for name in names:
            got, right = (m.get_submodule(name)(x) for m in (model, dense))
            torch.testing.assert_close(got, right, atol=1e-5, rtol=1e-5)
    assert len(calls) == 2


def test_what_may_change_or_has_no_kernel_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(384, 384), nn.Linear(384, 384).double(), nn.Linear(4, 4)).requires_grad_(False)
    model[0].requires_grad_(True)
    assert pack_linears(model, rows=5) == 0
    model[0].requires_grad_(False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert pack_linears(model, rows=5, compiled=False) == 0
    assert all(type(layer) is nn.Linear for layer in model)
