"""The ragged cache: rows write where they stand, and nothing stale is ever seen."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from adaptd.models.cache import RaggedCache, additive_mask, attention_windows, grouped_sdpa, prepare_attention
from tests.unit.decoding.tiny import make_model


def numbered(rows: int, heads: int, queries: int, dim: int = 2, start: int = 0) -> torch.Tensor:
    size = rows * heads * queries * dim
    return torch.arange(start, start + size, dtype=torch.float32).view(rows, heads, queries, dim)


def test_every_row_writes_at_its_own_positions_and_no_other() -> None:
    cache = RaggedCache(1, slots=4, capacity=8, device="cpu")
    keys = numbered(2, 3, 2)
    cache.point(1, torch.tensor([[0, 1], [4, 5]]), 6)
    seen, values = cache.update(keys, keys + 100, 0)
    assert seen.shape == (2, 3, 6, 2)
    assert torch.equal(seen[0, :, 0:2], keys[0])
    assert torch.equal(seen[1, :, 4:6], keys[1])
    assert torch.equal(values[1, :, 4:6], keys[1] + 100)
    assert seen[0, :, 2:].abs().sum() == 0
    assert seen[1, :, :4].abs().sum() == 0
    cache.point(0, torch.zeros(1, 1, dtype=torch.long), 8)
    untouched, _ = cache.update(torch.zeros(1, 3, 1, 2), torch.zeros(1, 3, 1, 2), 0)
    assert untouched.abs().sum() == 0


def test_moving_a_row_copies_its_prefix_in_every_layer() -> None:
    cache = RaggedCache(2, slots=3, capacity=4, device="cpu")
    for layer in range(2):
        cache.point(2, torch.arange(4)[None], 4)
        cache.update(numbered(1, 1, 4, start=10 * layer + 1), numbered(1, 1, 4, start=50), layer)
    cache.move([2], [0], 3)
    for layer in range(2):
        keys = cache.layers[layer].keys
        assert torch.equal(keys[0, :, :3], keys[2, :, :3])
        assert keys[0, :, 3].abs().sum() == 0
    assert cache.nbytes == 2 * 2 * 3 * 4 * 2 * 4


def test_rows_moved_together_are_read_before_any_is_written() -> None:
    cache = RaggedCache(1, slots=3, capacity=2, device="cpu")
    cache.point(0, torch.arange(2).expand(3, -1), 2)
    keys = numbered(3, 1, 2)
    cache.update(keys, keys, 0)
    cache.move([1, 2], [0, 1], 2)
    assert torch.equal(cache.layers[0].keys, keys[[1, 2, 2]])


def test_a_query_sees_its_own_position_and_what_is_before_it_within_the_window() -> None:
    positions = torch.tensor([[2, 3], [0, 1]])
    sees = additive_mask(positions, 5, None, torch.float32)[:, 0] == 0
    assert sees.tolist() == [
        [[True, True, True, False, False], [True, True, True, True, False]],
        [[True, False, False, False, False], [True, True, False, False, False]],
    ]
    sees = additive_mask(positions, 5, 2, torch.float32)[:, 0] == 0
    assert sees[0].tolist() == [[False, True, True, False, False], [False, False, True, True, False]]


def test_windows_follow_the_configuration() -> None:
    assert attention_windows(LlamaConfig(), 100) == {"full_attention": None}
    assert attention_windows(make_model("mistral", sliding_window=8).config, 100) == {"sliding_attention": 8}
    assert attention_windows(make_model("mistral", sliding_window=100).config, 100) == {"full_attention": None}
    hybrid = make_model("qwen3", use_sliding_window=True, sliding_window=8, max_window_layers=1)
    assert attention_windows(hybrid.config, 100) == {"full_attention": None, "sliding_attention": 8}


def test_a_recurrent_layer_is_refused_by_name() -> None:
    config = LlamaConfig()
    config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(ValueError, match="linear_attention"):
        attention_windows(config, 100)


def test_an_attention_kernel_without_masks_is_refused_by_name() -> None:
    model = make_model()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="flash_attention_2"):
        prepare_attention(model)


@pytest.mark.parametrize("queries", [1, 5])
def test_grouped_attention_equals_the_one_that_repeats_keys(queries: int) -> None:
    generator = torch.Generator().manual_seed(0)
    module = torch.nn.Module()
    module.num_key_value_groups = 3
    query = torch.randn(2, 6, queries, 4, generator=generator)
    key, value = torch.randn(2, 2, 2, 9, 4, generator=generator).unbind(0)
    mask = additive_mask(torch.arange(queries).expand(2, -1) + 3, 9, None, torch.float32)
    ours, _ = grouped_sdpa(module, query, key, value, mask, scaling=0.4)
    theirs, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.4)
    torch.testing.assert_close(ours, theirs)
    assert ours.shape == (2, queries, 6, 4)


def test_a_prepared_model_still_trains_and_generates_as_before() -> None:
    """The learner may run the same module with ordinary masks, or none."""
    model = make_model()
    ids = torch.randint(0, 97, (2, 9), generator=torch.Generator().manual_seed(1))
    padding = torch.ones_like(ids)
    padding[1, :4] = 0
    with torch.no_grad():
        before = model(ids, attention_mask=padding).logits[:, 5:], model(ids).logits
        prepare_attention(model)
        after = model(ids, attention_mask=padding).logits[:, 5:], model(ids).logits
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
