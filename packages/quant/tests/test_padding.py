"""Recipes with `pad`: layers whose inputs groups do not divide get columns of zeros, and compute as if they had none."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tersor.quant import Recipe, quantize, recipes
from tersor.quant.activation import IntActivation
from tersor.quant.allocation import DynamicProgram, LayerDivergence, MixedGrids
from tersor.quant.compensation import LowRank
from tersor.quant.estimate import estimate
from tersor.quant.export import Unexportable, export
from tersor.quant.grid import IntGrid, bits_per_weight
from tersor.quant.layers import solve
from tersor.quant.linear import QuantizedLinear
from tersor.quant.solver import GPTQ
from tersor.quant.stream import quantize_checkpoint
from tersor.quant.survey import schemes_of
from tersor.quant.transform import Hadamard
from tersor.quant.tuning import BlockReconstruction


@pytest.fixture
def model():
    """Attention of 48 inputs, which groups of 32 do not divide; an MLP whose last linear has 96, which they do."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 2, "vocab_size": 97}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2)).eval()


def layer_of(width: int, grid: IntGrid, seed: int) -> tuple[nn.Linear, QuantizedLinear]:
    linear = nn.Linear(width, 5)
    linear.weight.data = torch.randn(5, width, generator=torch.Generator().manual_seed(seed))
    recipe = Recipe(grid, pad=True)
    ((_, layer),) = solve({"linear": linear}, recipe, schemes_of(recipe, {}, {"linear": linear}), None)
    return linear, layer


@settings(deadline=None, max_examples=40, derandomize=True)
@given(st.integers(1, 70), st.sampled_from([8, 16, 32]), st.integers(1, 8), st.booleans(), st.integers(0, 99))
def test_groups_are_rounded_as_those_that_divide_and_the_last_one_with_zeros(width, group_size, bits, symmetric, seed):
    grid = IntGrid(bits, group_size, symmetric=symmetric)
    linear, layer = layer_of(width, grid, seed)
    assert layer.weight_shape == (5, width)
    assert layer.scheme.padding == -width % group_size
    longer = nn.functional.pad(linear.weight.detach(), (0, -width % group_size))
    params = grid.fit(longer)
    assert torch.equal(layer.dequantize(), grid.decode(grid.encode(longer, params), params)[:, :width])
    # stored are whole groups
    assert 8 * layer.nbytes / longer.numel() == bits_per_weight(grid, *longer.shape)
    x = torch.randn(3, width, generator=torch.Generator().manual_seed(seed))
    expected = x @ layer.dequantize().T + linear.bias
    torch.testing.assert_close(layer(x), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    "recipe",
    [
        recipes.gptq(4, 32),
        recipes.hqq(4, 32),
        recipes.quantease(4, 32),
        recipes.nf4(32),
        recipes.spqr(3, 32),
        recipes.bipolar_int(4, 8, 32),
        recipes.seedlm(10, 3, 8),
        Recipe(IntGrid(4, 32), GPTQ(), activation=IntActivation(8, 32)),
        Recipe(IntGrid(4, 32), GPTQ(), transforms=(Hadamard(),)),
        Recipe(IntGrid(4, 32), compensation=LowRank(4)),
        Recipe(IntGrid(4, 32), tuning=(BlockReconstruction(5),)),
        Recipe(
            IntGrid(3, 32),
            allocation=MixedGrids([IntGrid(b, 32) for b in (2, 3, 4)], DynamicProgram(LayerDivergence())),
        ),
    ],
    ids=lambda recipe: repr(recipe)[:60],
)
@torch.no_grad()
def test_a_padded_layer_multiplies_by_what_it_decodes(recipe, model, tmp_path):
    ids = torch.randint(0, 97, (16, 32), generator=torch.Generator().manual_seed(0))
    quantised = quantize(model, replace(recipe, pad=True), ids)
    padded = {n: m for n, m in quantised.named_modules() if isinstance(m, QuantizedLinear) and m.scheme.padding}
    assert padded
    for layer in padded.values():
        x = torch.randn(4, layer.in_features)
        exact = replace(layer.scheme, activation=None) if layer.scheme.activation else layer.scheme
        expected = x @ layer.dequantize().T
        error = (layer(x) - expected).norm() / expected.norm()
        assert error < (1e-3 if exact is layer.scheme else 0.03)
    quantised.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(ids).logits, quantised(ids).logits)


def test_only_layers_that_need_it_are_padded_and_the_estimate_counts_it(model):
    recipe = replace(recipes.rtn(4, 32), pad=True)
    expected = estimate(model, recipe)
    layers = {n: m for n, m in quantize(model, recipe).named_modules() if isinstance(m, QuantizedLinear)}
    assert {n.split(".")[-1] for n, m in layers.items() if not m.scheme.padding} == {"down_proj"}
    assert {m.scheme.padding for n, m in layers.items() if "down_proj" not in n} == {16}
    assert sum(expected.nbytes.values()) == sum(m.nbytes for m in layers.values())


@torch.no_grad()
def test_gptq_sees_that_nothing_comes_in_where_zeros_are(model):
    """It loses less than rounding, as it does without padding."""
    ids = torch.randint(0, 97, (32, 32), generator=torch.Generator().manual_seed(0))
    wanted, losses = model(ids).logits, []
    for recipe in (recipes.rtn(3, 32), recipes.gptq(3, 32)):
        copied = LlamaForCausalLM(model.config)
        copied.load_state_dict(model.state_dict())
        found = quantize(copied.eval(), replace(recipe, pad=True), ids)(ids).logits
        losses.append(float((found - wanted).square().mean()))
    assert losses[1] < 0.7 * losses[0]


def test_files_are_streamed_to_the_same(model, tmp_path):
    model.save_pretrained(tmp_path / "source")
    ids = torch.randint(0, 97, (16, 32), generator=torch.Generator().manual_seed(0))
    recipe = replace(recipes.gptq(4, 32), pad=True)
    quantize_checkpoint(tmp_path / "source", tmp_path / "streamed", recipe, ids)
    streamed = AutoModelForCausalLM.from_pretrained(tmp_path / "streamed").state_dict()
    expected = quantize(AutoModelForCausalLM.from_pretrained(tmp_path / "source"), recipe, ids).state_dict()
    assert streamed.keys() == expected.keys()
    assert all(torch.equal(streamed[name], tensor) for name, tensor in expected.items())


def test_what_cannot_be_padded_says_so(model, tmp_path):
    way_out = r"q_proj: in = 48 is not a multiple .* add 16 columns of zeros with .*pad=True.* or skip the layer"
    with pytest.raises(ValueError, match=way_out):
        quantize(model, recipes.rtn(4, 32))
    with pytest.raises(ValueError, match="ActScale would round weights before they are padded"):
        replace(recipes.awq(4, 32), pad=True)
    quantised = quantize(model, replace(recipes.rtn(4, 32), pad=True))
    for format in ("compressed-tensors", "gptq", "awq", "gguf"):
        with pytest.raises(Unexportable, match=r"no place for 16 zeros beside the inputs"):
            export(quantised, tmp_path / "out", format)
