"""Packed layers compute what the layers they replace compute."""

import copy

import pytest
import torch
from torch import nn

from adaptd.decoding.engine import SpeculativeDecoder
from adaptd.decoding.request import DecodeRequest, SamplingParams
from adaptd.models.load import weights_id
from adaptd.models.packed import PackedLinear, can_pack, pack_linears
from tests.unit.decoding.tiny import greedy_reference, make_draft, make_model, make_prompts, serve

needs_kernels = pytest.mark.skipif(not can_pack(torch.float32), reason="a torch build without oneDNN")
BOTH = [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.skipif(not can_pack(torch.bfloat16), reason=""))]


@needs_kernels
@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("bias", [False, True])
def test_any_rows_any_strides(dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(384, 200, bias=bias).to(dtype).requires_grad_(False)
    packed = PackedLinear(layer, 5)
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
    assert pack_linears(packed, rows=4) == 2 * 5  # keys and values are too small
    assert pack_linears(packed, rows=4) == 0
    assert weights_id(packed) == weights_id(target)
    engine = SpeculativeDecoder(packed, make_draft(target, noise=0.004), k=3, max_batch=4, max_length=80)
    requests = [DecodeRequest(str(i), p, SamplingParams(temperature=0.0, max_tokens=14)) for i, p in enumerate(prompts)]
    done = serve(engine, requests)
    assert [list(done[str(i)].token_ids) for i in range(12)] == answers


def test_what_may_change_or_has_no_kernel_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(384, 384), nn.Linear(384, 384).double(), nn.Linear(4, 4)).requires_grad_(False)
    model[0].requires_grad_(True)
    assert pack_linears(model, rows=5) == 0
    model[0].requires_grad_(False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert pack_linears(model, rows=5) == 0
    assert all(type(layer) is nn.Linear for layer in model)
