"""The walk: against a slow one that anybody can check, and what it promises about the model."""

import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

from tersor.quant import quantize, recipes
from tersor.quant.calibration import SecondMoments
from tersor.quant.linear import QuantizedLinear
from tersor.quant.solver import RTN, relative_error

ALL = [recipes.rtn(4, 32), *(recipes.gptq(4, 32, order=order) for order in ("none", "act", "group"))]
every_recipe = pytest.mark.parametrize("recipe", ALL, ids=str)
# 512 tokens are enough for layers of 64 and 96 inputs
ORDER = ("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


@torch.no_grad()
def slow_walk(model, recipe, ids):
    """The whole model for every layer's moments, and every layer solved by itself."""
    for index in range(len(model.model.layers)):
        for names in ORDER:
            layers = {}
            for name, linear in list(model.model.layers[index].named_modules()):
                if name.endswith(names):
                    seen: list[torch.Tensor] = []
                    handle = linear.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
                    model(ids)
                    handle.remove()
                    moments = SecondMoments(linear.in_features)
                    moments.update(seen[0].flatten(0, 1))
                    result = recipe.solver.solve(linear.weight, recipe.grid, moments.mean)
                    layers[name] = QuantizedLinear.from_linear(linear, recipe.scheme, recipe.grid.pack(*result))
            for name, layer in layers.items():
                model.model.layers[index].set_submodule(name, layer)
    return model


@every_recipe
def test_the_walk_equals_the_slow_one(make_model, kind, recipe, ids):
    fast, slow = quantize(make_model(kind), recipe, ids), slow_walk(make_model(kind), recipe, ids)
    theirs = quantized_layers(slow)
    for name, layer in quantized_layers(fast).items():
        # float32 sums over other shapes: hardly ever, a weight half-way between two levels falls to the other side
        assert (layer.dequantize() == theirs[name].dequantize()).float().mean() > 0.99, name
    torch.testing.assert_close(fast(ids).logits, slow(ids).logits, rtol=1e-2, atol=1e-2)


@every_recipe
def test_all_linears_of_the_blocks_are_replaced_and_nothing_else(make_model, kind, recipe, ids):
    model = make_model(kind)
    embedding, norm = model.get_input_embeddings(), model.model.norm
    head, before = model.get_output_embeddings().weight, {n: p.clone() for n, p in model.named_parameters()}
    assert quantize(model, recipe, ids) is model
    assert len(quantized_layers(model)) == 2 * 7
    assert not any(type(module) is nn.Linear for module in model.model.layers.modules())
    assert model.get_input_embeddings() is embedding
    assert model.model.norm is norm
    assert model.get_output_embeddings().weight is head
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])


def test_tied_embeddings_stay_tied(make_model, ids):
    model = quantize(make_model("gemma3"), recipes.gptq(4, 32), ids)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@torch.no_grad()
def test_more_bits_come_closer(make_model, kind, ids):
    dense = make_model(kind)(ids).logits
    errors = []
    for bits in (2, 3, 4, 6, 8):
        model = quantize(make_model(kind), recipes.gptq(bits, 32), ids)
        errors.append(float((model(ids).logits - dense).norm() / dense.norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.02


class Rounding(RTN):
    """Rounds to nearest, but has the walk collect what the layers are given."""

    needs_hessian = True


def test_gptq_loses_less_of_every_layer_than_rounding(make_model, kind, ids):
    gptq = recipes.gptq(3, 32)
    ours, nearest = (
        [layer.relative_error for layer in quantized_layers(quantize(make_model(kind), recipe, ids)).values()]
        for recipe in (gptq, replace(gptq, solver=Rounding()))
    )
    ratios = [a / b for a, b in zip(ours, nearest)]
    assert max(ratios) < 1
    assert sum(ratios) / len(ratios) < 0.8


@torch.no_grad()
def test_the_reported_error_is_that_of_the_outputs(make_model, ids):
    model = make_model()
    linear = model.model.layers[0].self_attn.q_proj
    x = model.model.layers[0].input_layernorm(model.model.embed_tokens(ids))
    dense = linear(x)
    quantize(model, recipes.gptq(3, 32), ids)
    layer = model.model.layers[0].self_attn.q_proj
    assert layer.relative_error == pytest.approx(
        float((layer(x) - dense).square().sum() / dense.square().sum()), rel=1e-3
    )


def test_without_data_the_reported_error_is_that_of_the_weight(make_model):
    model = make_model()
    weight = model.model.layers[1].mlp.down_proj.weight.detach()
    layer = quantize(model, recipes.rtn(3, 32)).model.layers[1].mlp.down_proj
    assert layer.relative_error == pytest.approx(relative_error(weight, layer.dequantize(), None))


@every_recipe
def test_the_same_call_gives_the_same_bits(make_model, recipe, ids):
    first, second = (quantize(make_model(), recipe, ids).state_dict() for _ in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_progress_counts_every_layer_once(make_model, kind, ids):
    calls = []
    model = quantize(make_model(kind), recipes.gptq(4, 32), ids, progress=lambda *call: calls.append(call))
    assert [(done, total) for done, total, _ in calls] == [(n + 1, 14) for n in range(14)]
    assert {name for _, _, name in calls} == set(quantized_layers(model))


def test_quantised_layers_free_their_weights_as_the_walk_goes(make_model, ids):
    """The peak is the model, its smaller copy so far, and one block's activations."""
    model = make_model()
    weights = [weakref.ref(linear.weight) for linear in model.model.layers[0].modules() if type(linear) is nn.Linear]
    alive = {}

    def progress(done, total, name):
        alive[name] = sum(weight() is not None for weight in weights)

    quantize(model, recipes.gptq(4, 32), ids, progress=progress)
    del model
    assert alive["model.layers.1.self_attn.o_proj"] == 0


def test_the_model_keeps_its_mode_and_carries_no_hooks(make_model, ids):
    model = make_model()
    model.train()
    model.model.layers[0].eval()
    quantize(model, recipes.gptq(4, 32), ids)
    assert model.training
    assert not model.model.layers[0].input_layernorm.training
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not model(ids).logits.isnan().any()


def test_an_interrupted_walk_leaves_no_hooks_and_the_mode(make_model, ids):
    model = make_model().train()

    def interrupt(done, total, name):
        if done == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(model, recipes.gptq(4, 32), ids, progress=interrupt)
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())
    # half of it is quantised: it must not pass for an original
    with pytest.raises(ValueError, match="quantised already"):
        quantize(model, recipes.gptq(4, 32), ids)


def test_bfloat16_models_stay_bfloat16(make_model, kind, ids):
    model = quantize(make_model(kind, torch.bfloat16), recipes.gptq(4, 32), ids)
    assert model.dtype == torch.bfloat16
    assert model(ids).logits.dtype == torch.bfloat16
    assert {tensor.dtype for tensor in model.parameters()} == {torch.bfloat16}


def test_a_quantised_model_generates(make_model, kind, ids):
    model = quantize(make_model(kind), recipes.gptq(4, 32), ids)
    with_cache = model.generate(ids[:2, :5], max_new_tokens=8, do_sample=False)
    without = model.generate(ids[:2, :5], max_new_tokens=8, do_sample=False, use_cache=False)
    assert with_cache.shape == (2, 13)
    assert torch.equal(with_cache, without)


@pytest.mark.parametrize(
    ("keep", "left"),
    [
        (["down_proj"], 12),
        (["layers.0"], 7),
        (["model.layers.1.mlp.up_proj"], 13),
        (["layers.?.self_attn", "down_proj"], 4),
        (["lm_head"], 14),
    ],
)
def test_what_is_kept_stays_as_it_was(make_model, ids, keep, left):
    model = make_model()
    before = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    quantize(model, recipes.gptq(4, 32), ids, keep=keep)
    quantised = quantized_layers(model)
    assert len(quantised) == left
    assert all(model.get_submodule(name) is module for name, module in before.items() if name not in quantised)


def unchanged(model: nn.Module) -> bool:
    return not quantized_layers(model) and len([m for m in model.modules() if type(m) is nn.Linear]) >= 14


@pytest.mark.parametrize("recipe", [recipes.rtn(4, 48), recipes.gptq(4, 48)], ids=str)
def test_a_group_size_that_does_not_divide_names_the_layer_and_the_ways_out(make_model, recipe, ids):
    model = make_model()
    with pytest.raises(
        ValueError,
        match=r"model\.layers\.0\.self_attn\.q_proj: in = 64 is not a multiple of group_size = 48; use group_size = .*"
        r"keep=\['model\.layers\.0\.self_attn\.q_proj'\]",
    ):
        quantize(model, recipe, ids)
    assert unchanged(model)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@every_recipe
def test_broken_weights_are_named_before_any_work(make_model, recipe, value, ids):
    model = make_model()
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = value
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj: the weight holds NaN or infinity"):
        quantize(model, recipe, ids)
    assert unchanged(model)
    quantize(model, recipes.rtn(4, 32), keep=["model.layers.1.mlp.up_proj"])


def test_activations_that_overflow_are_named(make_model, ids):
    model = make_model()
    model.model.layers[1].input_layernorm.weight.data.fill_(float("inf"))
    with pytest.raises(ValueError, match=r"model\.layers\.1\.self_attn\.q_proj: its inputs .* hold NaN or infinity"):
        quantize(model, recipes.gptq(4, 32), ids)


def test_weights_too_large_for_the_scales_name_their_layer(make_model):
    model = make_model()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = 1e8
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj: .* beyond float16"):
        quantize(model, recipes.rtn(4, 32))


def test_missing_data_is_asked_for(make_model):
    model = make_model()
    with pytest.raises(ValueError, match="learns from data: give calibration="):
        quantize(model, recipes.gptq(4, 32))
    assert unchanged(model)


def test_little_data_is_said_to_be_little(make_model, ids, recwarn):
    quantize(make_model(), recipes.gptq(4, 32), ids)
    assert not recwarn.list  # 512 tokens are more than four times 96 inputs
    with pytest.warns(
        UserWarning, match="320 calibration tokens are few for layers with 96 inputs; use at least 384"
    ) as w:
        quantize(make_model(), recipes.gptq(4, 32), ids[:10])
    assert w[0].filename == __file__


def test_padding_does_not_count_as_data(make_model, ids):
    mask = torch.zeros_like(ids)
    mask[:, :4] = 1
    with pytest.warns(UserWarning, match="64 calibration tokens are few"):
        quantize(make_model(), recipes.gptq(4, 32), [{"input_ids": ids, "attention_mask": mask}])


def test_a_layer_that_never_ran_is_named(make_model, ids):
    model = make_model()
    model.model.layers[0].mlp.idle_proj = nn.Linear(64, 64)
    with pytest.raises(
        ValueError, match=r"layers\.0\.mlp\.idle_proj saw no token .* keep=\['model\.layers\.0\.mlp\.idle"
    ):
        quantize(model, recipes.gptq(4, 32), ids)
    model = make_model()
    model.model.layers[0].mlp.idle_proj = nn.Linear(64, 64)
    assert len(quantized_layers(quantize(model, recipes.gptq(4, 32), ids, keep=["idle_proj"]))) == 14


def test_linears_of_other_classes_are_not_left_in_silence(make_model, recwarn):
    class Scaled(nn.Linear):
        pass

    model = make_model()
    model.model.layers[1].mlp.up_proj.__class__ = Scaled
    with pytest.warns(
        UserWarning,
        match=r"1 linears of classes of their own stay .*model\.layers\.1\.mlp\.up_proj .* keep=\['up_proj'\]",
    ):
        quantize(model, recipes.rtn(4, 32))
    assert len(quantized_layers(model)) == 13
    recwarn.clear()
    model = make_model()
    model.model.layers[1].mlp.up_proj.__class__ = Scaled
    quantize(model, recipes.rtn(4, 32), keep=["up_proj"])
    assert not recwarn.list


def test_a_recipe_that_finds_no_layer_says_so(make_model):
    with pytest.raises(ValueError, match=r"no linear of model\.layers is left to quantise: keep=\['layers'\]"):
        quantize(make_model(), recipes.rtn(4, 32), keep=["layers"])


def test_keep_must_name_something(make_model):
    with pytest.raises(ValueError, match="keep names 'down_porj', which is no part of LlamaForCausalLM"):
        quantize(make_model(), recipes.rtn(4, 32), keep=["down_porj"])
    with pytest.raises(TypeError, match=r"use keep=\['lm_head'\]"):
        quantize(make_model(), recipes.rtn(4, 32), keep="lm_head")


def test_experts_in_one_parameter_are_named_and_can_be_kept(make_model):
    model = make_model()
    model.model.layers[1].mlp.experts = nn.Module()
    model.model.layers[1].mlp.experts.gate_up_proj = nn.Parameter(torch.randn(4, 8, 8))
    with pytest.raises(
        NotImplementedError, match=r"layers\.1\.mlp\.experts\.gate_up_proj holds experts .* \(4, 8, 8\)"
    ):
        quantize(model, recipes.rtn(4, 32))
    assert unchanged(model)
    assert len(quantized_layers(quantize(model, recipes.rtn(4, 32), keep=["experts"]))) == 14


def test_layers_that_share_a_weight_are_named(make_model):
    model = make_model()
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(
        NotImplementedError,
        match=r"model\.layers\.0\.mlp\.up_proj\.weight and model\.layers\.1\.mlp\.up_proj\.weight are one parameter",
    ):
        quantize(model, recipes.rtn(4, 32))
    quantize(model, recipes.rtn(4, 32), keep=["up_proj"])


def test_a_quantised_model_is_not_quantised_again(make_model):
    model = quantize(make_model(), recipes.rtn(4, 32))
    with pytest.raises(ValueError, match="quantised already"):
        quantize(model, recipes.rtn(4, 32))


def test_what_is_no_model_of_transformers_is_refused():
    with pytest.raises(TypeError, match="must be a model of transformers, got Linear"):
        quantize(nn.Linear(2, 2), recipes.rtn())


def test_encoders_without_a_causal_mask_work_too(ids):
    config = BertConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=97)
    model = quantize(BertModel(config).eval(), recipes.gptq(4, 16), ids)
    assert len(quantized_layers(model)) == 2 * 6
    assert type(model.pooler.dense) is nn.Linear
