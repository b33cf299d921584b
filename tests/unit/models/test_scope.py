"""The adapted draft: day 0 is the base, only the scope learns, both forms compute one function."""

import pytest
import torch
from torch import Tensor

from adaptd.errors import AdaptdError, ConfigError
from adaptd.models.load import weights_id
from adaptd.models.private_expert import GATE_GAIN
from adaptd.models.request_gate import conditioned, request_gate
from adaptd.models.scope import AdaptedDraft, ScopeConfig

SMALL = {"width": 12, "lora_rank": 4}
CONFIGS = {
    "gated": ScopeConfig(**SMALL, head_rank=3),
    "ungated": ScopeConfig(**SMALL, head_rank=3, gated=False, head_bias=False),
    "expert_only": ScopeConfig(width=12, lora_rank=0, head_rank=0),
    "expert_with_lora_on_its_ffn": ScopeConfig(
        **SMALL, head_rank=0, gated=False, lora_targets=("gate_proj", "down_proj")
    ),
    "lora": ScopeConfig(scope="lora", lora_rank=4),
    "lora_with_head": ScopeConfig(scope="lora", lora_rank=4, head_rank=3),
    "full": ScopeConfig(scope="full"),
}
PAIRS = [
    *[("llama", name) for name in CONFIGS],
    *[("llama_untied_biased", name) for name in ("gated", "ungated", "lora_with_head", "full")],
    *[("qwen3", name) for name in ("gated", "ungated", "lora", "full")],
    *[("gpt2", name) for name in ("gated", "ungated", "lora", "lora_with_head")],
    *[("opt", name) for name in ("lora", "lora_with_head")],
]


def randomise(draft: AdaptedDraft, seed: int = 5) -> None:
    """Learned values far from day 0, so that every part acts; gates between shut and open."""
    generator = torch.Generator().manual_seed(seed)

    def value(name: str, tensor: Tensor) -> Tensor:
        scale = 0.3 / GATE_GAIN if name.endswith("gate.weight") else 0.3
        return torch.randn(tensor.shape, generator=generator) * scale

    draft.load({name: value(name, t) for name, t in draft.expected().items()})


@torch.no_grad()
def logits(model: torch.nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids).logits


@pytest.mark.parametrize("serving", [False, True])
@pytest.mark.parametrize(("kind", "name"), PAIRS)
def test_day_0_is_the_base(make_model, ids, kind, name, serving):
    expected = logits(make_model(kind), ids)
    draft = AdaptedDraft(make_model(kind), CONFIGS[name], serving=serving)
    torch.testing.assert_close(logits(draft.model, ids), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(("kind", "name"), PAIRS)
def test_training_and_serving_form_compute_one_function(make_model, ids, kind, name):
    training = AdaptedDraft(make_model(kind), CONFIGS[name])
    serving = AdaptedDraft(make_model(kind), CONFIGS[name], serving=True)
    day_0 = logits(training.model, ids)
    randomise(training)
    with torch.no_grad():
        for tensor_name, place in serving.expected().items():
            place.copy_(training.state()[tensor_name])
    serving.refresh()
    learned = logits(training.model, ids)
    assert (learned - day_0).abs().max() > 0.1, "the learned values must matter"
    torch.testing.assert_close(logits(serving.model, ids), learned, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_checkpoint_serves_both_forms(make_model, name, dtype):
    def specs(draft: AdaptedDraft) -> dict[str, tuple[torch.Size, torch.dtype]]:
        return {tensor_name: (t.shape, t.dtype) for tensor_name, t in draft.expected().items()}

    training = AdaptedDraft(make_model(), CONFIGS[name])
    serving = AdaptedDraft(make_model(dtype=dtype), CONFIGS[name], serving=True)
    assert specs(training) == specs(serving)
    assert {dtype for _, dtype in specs(serving).values()} == {torch.float32}


def test_the_default_scope_trains_these_tensors_and_nothing_else(make_model):
    draft = AdaptedDraft(make_model())
    assert {name: tuple(p.shape) for name, p in draft.trainable().items() if ".1." not in name} == {
        "model.embed_tokens.low_rank.up.weight": (48, 24),
        "model.embed_tokens.low_rank.down.weight": (24, 16),
        **{
            f"model.layers.0.self_attn.{layer}.lora_{matrix}.weight": shape
            for layer, rows in (("q_proj", 16), ("k_proj", 8), ("v_proj", 8), ("o_proj", 16))
            for matrix, shape in (("A", (16, 16)), ("B", (rows, 16)))
        },
        "model.layers.0.mlp.private.up.weight": (256, 16),
        "model.layers.0.mlp.private.down.weight": (16, 128),
        "model.layers.0.mlp.gate.weight": (1, 16),
        "lm_head.low_rank.down.weight": (24, 16),
        "lm_head.low_rank.up.weight": (48, 24),
        "lm_head.low_rank.bias": (48,),
        "lm_head.low_rank.gate.weight": (1, 16),
        "request_gate.weight": (1, 16),
        "request_gate.bias": (1,),
        "request_gate.centre": (16,),
    }
    learning = {id(p) for p in draft.model.parameters() if p.requires_grad}
    assert learning == {id(p) for p in draft.trainable().values()}


def test_every_learned_tensor_gets_a_gradient_and_learned_tensors_are_float32_on_a_bfloat16_base(make_model, ids):
    for dtype in (torch.float32, torch.bfloat16):
        draft = AdaptedDraft(make_model(dtype=dtype), CONFIGS["gated"])
        randomise(draft)
        gate = request_gate(draft.model)
        with conditioned(draft.model, gate(gate.features(ids))):
            draft.model(input_ids=ids).logits.float().logsumexp(-1).sum().backward()
        without = [name for name, p in draft.trainable().items() if p.grad is None or not p.grad.any()]
        # The centre is set once, from traffic.
        assert without == ["request_gate.centre"]
        assert {p.grad.dtype for p in draft.trainable().values() if p.grad is not None} == {torch.float32}


def test_a_serving_draft_requires_no_gradients(make_model, ids):
    draft = AdaptedDraft(make_model(), CONFIGS["gated"], serving=True)
    assert not draft.model(input_ids=ids).logits.requires_grad
    assert not any(p.requires_grad for p in draft.trainable().values())


def test_prove_frozen_names_a_tensor_that_would_learn_and_one_that_would_not(make_model):
    draft = AdaptedDraft(make_model(), CONFIGS["gated"])
    draft.model.get_parameter("model.norm.weight").requires_grad_(True)
    with pytest.raises(AdaptdError, match=r"1 frozen tensors .*model\.norm\.weight"):
        draft.prove_frozen()
    draft.model.get_parameter("model.norm.weight").requires_grad_(False)
    draft.trainable()["lm_head.low_rank.bias"].requires_grad_(False)
    with pytest.raises(AdaptdError, match=r"lm_head\.low_rank\.bias"):
        draft.prove_frozen()


def test_frozen_tensors_stay_bit_identical_through_1000_optimiser_steps(make_model, ids):
    draft = AdaptedDraft(make_model(layers=1), CONFIGS["gated"])
    before = draft.state()
    optimiser = torch.optim.AdamW(draft.trainable().values(), lr=1e-2, weight_decay=0.1, fused=True)
    short, wanted = ids[:1, :4], ids[:1, 1:5].flatten()
    for _ in range(1000):
        optimiser.zero_grad()
        loss = torch.nn.functional.cross_entropy(draft.model(input_ids=short).logits[0], wanted)
        loss.backward()
        optimiser.step()
    assert loss < 0.5, "it did learn"
    base = make_model(layers=1).state_dict()
    frozen = draft.base_state()
    assert frozen.keys() == base.keys()
    assert all(torch.equal(frozen[name], tensor) for name, tensor in base.items())
    assert weights_id(frozen) == draft.base_id
    assert not any(
        torch.equal(before[name], tensor)
        for name, tensor in draft.state().items()
        if not name.startswith("request_gate.")  # the gate acts on requests alone
    )
    # Those are the very tensors that the forward pass uses, and with the learned ones they are all it has.
    used = {id(p) for p in draft.model.parameters()}
    assert used == {id(t) for t in [*draft._base.values(), *draft.trainable().values()]}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_refresh_never_drifts_and_never_moves_storage(make_model, ids, name, dtype):
    """Merging and unmerging in place would leave rounding behind, and a captured graph holds the old addresses."""
    draft = AdaptedDraft(make_model(dtype=dtype), CONFIGS[name], serving=True)

    def addresses() -> list[int]:
        tensors = [*draft.model.parameters(), *draft.model.buffers()]
        return [t.data_ptr() for t in tensors]

    first, places = logits(draft.model, ids), addresses()
    for seed in range(20):
        randomise(draft, seed)
    assert not torch.equal(logits(draft.model, ids), first)
    draft.reset()
    assert torch.equal(logits(draft.model, ids), first)
    assert addresses() == places
    assert weights_id(draft.base_state()) == draft.base_id == weights_id(make_model(dtype=dtype))


def test_state_goes_round_trip_and_is_a_copy(make_model, ids):
    draft, other = (AdaptedDraft(make_model(), CONFIGS["gated"]) for _ in range(2))
    randomise(draft)
    state, expected = draft.state(), logits(draft.model, ids)
    other.load(state)
    assert torch.equal(logits(other.model, ids), expected)
    draft.reset()
    assert torch.equal(logits(draft.model, ids), logits(make_model(), ids))
    assert not torch.equal(state["lm_head.low_rank.bias"], draft.state()["lm_head.low_rank.bias"])
    draft.load(state)
    assert torch.equal(logits(draft.model, ids), expected)


def test_loading_no_tensors_at_all_means_day_0(make_model, ids):
    draft = AdaptedDraft(make_model(), CONFIGS["lora"], serving=True)
    randomise(draft)
    draft.load({})
    torch.testing.assert_close(logits(draft.model, ids), logits(make_model(), ids))


@pytest.mark.parametrize("damage", ["missing", "extra", "shape"])
def test_loading_another_configuration_is_refused_before_anything_is_written(make_model, damage):
    draft = AdaptedDraft(make_model(), CONFIGS["gated"])
    before = draft.state()
    tensors = {name: t + 1 for name, t in before.items()}
    if damage == "missing":
        del tensors["lm_head.low_rank.bias"]
    elif damage == "extra":
        tensors["lm_head.low_rank.scale"] = torch.zeros(1)
    else:
        tensors["lm_head.low_rank.bias"] = torch.zeros(47)
    with pytest.raises(ValueError, match=r"1 tensors do not fit scope private_expert, first 'lm_head\.low_rank"):
        draft.load(tensors)
    assert all(torch.equal(before[name], t) for name, t in draft.state().items())


def test_day_0_values_depend_on_the_seed_only(make_model):
    torch.manual_seed(1)
    first = AdaptedDraft(make_model(seed=3), CONFIGS["gated"]).state()
    torch.manual_seed(2)
    second = AdaptedDraft(make_model(seed=4), CONFIGS["gated"], serving=True).state()
    assert all(torch.equal(first[name], t) for name, t in second.items())
    other = AdaptedDraft(make_model(), ScopeConfig(**SMALL, head_rank=3, seed=1)).state()
    assert not torch.equal(other["lm_head.low_rank.down.weight"], first["lm_head.low_rank.down.weight"])


@pytest.mark.parametrize("serving", [False, True])
def test_decoding_with_a_cache_gives_the_logits_of_one_pass(make_model, ids, serving):
    draft = AdaptedDraft(make_model(), CONFIGS["gated"], serving=serving)
    randomise(draft)
    with torch.no_grad():
        prefix = draft.model(input_ids=ids[:, :4], use_cache=True)
        rest = draft.model(input_ids=ids[:, 4:], past_key_values=prefix.past_key_values, use_cache=True).logits
    torch.testing.assert_close(rest, logits(draft.model, ids)[:, 4:], atol=1e-4, rtol=1e-4)


def test_serving_in_bfloat16_is_no_further_from_float32_than_training_in_bfloat16(make_model, ids):
    """The training form keeps learned parts in float32: what it loses is the base's rounding alone."""
    form = {"exact": (torch.float32, False), "training": (torch.bfloat16, False), "serving": (torch.bfloat16, True)}
    drafts = {
        name: AdaptedDraft(make_model(dtype=dtype), CONFIGS["gated"], serving=serving)
        for name, (dtype, serving) in form.items()
    }
    error = dict.fromkeys(form, 0.0)
    for seed in range(8):
        randomise(drafts["exact"], seed)
        exact = logits(drafts["exact"].model, ids)
        for name in ("training", "serving"):
            drafts[name].load(drafts["exact"].state())
            found = logits(drafts[name].model, ids)
            error[name] += float((exact - found.float()).abs().mean() / exact.abs().mean()) / 8
    assert error["training"] < 0.05
    assert error["serving"] < 1.5 * error["training"]


def test_wrapping_twice_is_refused(make_model):
    model = make_model()
    AdaptedDraft(model, CONFIGS["lora"])
    with pytest.raises(ValueError, match="already adapted with scope lora"):
        AdaptedDraft(model, CONFIGS["gated"])


def test_the_trainable_fraction_of_full_is_one(make_model):
    assert AdaptedDraft(make_model(), CONFIGS["full"]).trainable_fraction == 1.0
    assert 0 < AdaptedDraft(make_model(), CONFIGS["expert_only"]).trainable_fraction < 0.8


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"scope": "private_experts"}, r"scope \('private_experts'\) .* nearest: private_expert"),
        ({"width": 0}, r"width \(0\)"),
        ({"lora_rank": -1}, r"lora_rank \(-1\)"),
        ({"scope": "lora", "lora_rank": 0}, r"lora_rank \(0\) must be at least 1 for scope lora"),
        ({"lora_alpha": 0.0}, r"lora_alpha \(0\.0\)"),
        ({"head_rank": -2}, r"head_rank \(-2\)"),
        ({"lora_targets": ()}, r"lora_targets \(\(\)\)"),
        ({"lora_targets": "q_proj"}, r"lora_targets \('q_proj'\)"),
    ],
)
def test_a_bad_setting_is_named_with_its_value(values, message):
    with pytest.raises(ConfigError, match=message):
        ScopeConfig(**values)


def test_a_scope_configuration_goes_round_trip_through_json_types():
    config = ScopeConfig(lora_targets=("q_proj", "v_proj"), head_rank=None)
    values = config.to_dict()
    assert values["lora_targets"] == ["q_proj", "v_proj"]
    assert ScopeConfig(**values) == config


def test_an_unknown_lora_target_is_refused_with_the_layers_there_are(make_model):
    config = ScopeConfig(scope="lora", lora_targets=("q_proj", "query"))
    with pytest.raises(
        ConfigError, match=r"'query' names no linear layer of LlamaForCausalLM; there are down_proj, gate_proj"
    ):
        AdaptedDraft(make_model(), config)


def test_a_private_expert_on_opt_is_refused_with_the_layers_there_are(make_model):
    with pytest.raises(ConfigError, match=r"no feed-forward module .* OPTForCausalLM.* fc1, fc2.* use scope lora"):
        AdaptedDraft(make_model("opt"))
