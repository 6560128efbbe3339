"""Ranges that are learnt through the block, and how they reach the solver."""

import copy
from dataclasses import dataclass, replace

import pytest
import torch

from tersor.quant import Recipe, quantize
from tersor.quant.blocks import linears
from tersor.quant.calibration import batches, block_inputs
from tersor.quant.grid import IntGrid, NormalFloatGrid
from tersor.quant.linear import QuantizedLinear
from tersor.quant.solver import GPTQ, RTN
from tersor.quant.transform import BlockTransform, LearnedRange, RangeTransform

GRID = IntGrid(4, None, symmetric=True)


@pytest.fixture
def tailed(make_model):
    """A model whose largest weights read a channel that is always zero."""
    model = make_model()
    for block in model.model.layers:
        block.input_layernorm.weight.data[7] = block.post_attention_layernorm.weight.data[7] = 0
        for linear in linears(block).values():
            if linear.in_features == 64 and linear is not block.self_attn.o_proj:
                linear.weight.data[:, 7] = 10 * linear.weight.data.std()
    return model


def quantised(model, recipe, ids):
    model = quantize(copy.deepcopy(model), recipe, ids)
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantizedLinear)}


@dataclass(frozen=True)
class Half:
    """Of every range the half."""

    def ranges(self, block, inputs, index, grids):
        return {linear: torch.full_like(linear.weight[:, :1], 0.5) for linear in grids}


@pytest.mark.parametrize("solver", [RTN(), GPTQ(), GPTQ(order="none")], ids=str)
@pytest.mark.parametrize("group_size", [None, 32])
@torch.no_grad()
def test_the_solver_fits_its_grid_to_a_share_of_the_range_and_rounds_the_whole_weight(
    solver, group_size, make_model, ids
):
    model = make_model()
    recipe = Recipe(IntGrid(4, group_size, symmetric=True), solver, (Half(),))
    whole, half = quantised(model, replace(recipe, transforms=()), ids), quantised(model, recipe, ids)
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"):
        scales = [layers[name].stored()["scale_bits"].view(torch.float16).float() for layers in (whole, half)]
        if solver != GPTQ(order="none"):  # which fits groups to weights that are corrected before
            torch.testing.assert_close(scales[1], scales[0] / 2, rtol=2**-9, atol=0)
        assert half[name].scheme.grid == recipe.grid
    # all of the first layer's error counts, what is clipped off too
    original = model.model.layers[0].self_attn.q_proj.weight
    decoded = half["model.layers.0.self_attn.q_proj"].dequantize()
    assert (original - decoded).abs().max() > 0.3 * original.abs().max()


@torch.no_grad()
def test_a_block_comes_closer_to_its_outputs(tailed, ids):
    block, inputs = tailed.model.layers[0], block_inputs(tailed, tailed.model.layers, batches(ids))
    grids = dict.fromkeys(linears(block).values(), GRID)
    before = copy.deepcopy(block.state_dict())
    shares = LearnedRange(60, 0.3).ranges(block, inputs, 0, grids)
    assert shares.keys() == grids.keys()
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())
    wanted, errors = inputs[0].run(0, block), []
    for some in ({}, shares):
        rounded = copy.deepcopy(block)
        for name, linear in linears(block).items():
            W, share = linear.weight, some.get(linear, torch.ones(1, 1))
            assert ((share > 0) & (share <= 1)).all()
            params = GRID.fit(share * W)
            rounded.get_submodule(name).weight.copy_(GRID.decode(GRID.encode(W, params), params))
        errors.append(float((inputs[0].run(0, rounded) - wanted).square().sum()))
    assert errors[1] < 0.3 * errors[0]


@torch.no_grad()
def test_ranges_without_anything_to_gain_stay_whole(make_model, ids):
    """Weights that are levels already, of a grid that is fitted to them again."""
    model, grid = make_model(), replace(GRID, restricted=True)
    for linear in linears(model.model.layers).values():
        params = grid.fit(linear.weight)
        linear.weight.copy_(grid.decode(grid.encode(linear.weight, params), params))
    block, inputs = model.model.layers[0], block_inputs(model, model.model.layers, batches(ids))
    assert LearnedRange(5).ranges(block, inputs, 0, dict.fromkeys(linears(block).values(), grid)) == {}


def test_what_is_kept_is_not_learnt_for(make_model, ids):
    model = quantize(make_model(), Recipe(GRID, GPTQ(), (LearnedRange(2),)), ids, keep=["layers.0", "o_proj"])
    assert sum(isinstance(m, QuantizedLinear) for m in model.modules()) == 6


def test_bad_settings_are_named(make_model, ids):
    for settings, says in (({"steps": 0}, "steps must be positive"), ({"rate": 0.0}, "rate must be positive")):
        with pytest.raises(ValueError, match=says):
            LearnedRange(**settings)
    with pytest.raises(TypeError, match="evenly spaced levels, which NormalFloatGrid.* use an IntGrid"):
        Recipe(NormalFloatGrid(), transforms=(LearnedRange(),))
    with pytest.raises(ValueError, match="learns from data"):
        quantize(make_model(), Recipe(GRID, transforms=(LearnedRange(),)))


def test_it_is_a_range_transform():
    assert isinstance(LearnedRange(), RangeTransform)
    assert not isinstance(LearnedRange(), BlockTransform)
