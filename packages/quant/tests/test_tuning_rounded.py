"""Steps, ranges and roundings learnt block by block."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from tersor.quant import Recipe, quantize
from tersor.quant.grid import IntGrid, MaskedBinary, NormalFloatGrid
from tersor.quant.linear import QuantizedLinear
from tersor.quant.scheme import Scheme
from tersor.quant.solver import GPTQ, RTN, LearnedRounding, WeightedRTN
from tersor.quant.tuning import BlockReconstruction, BlockScales, LearnedClip, LearnedStep
from tersor.quant.tuning.rounded import ClippedLinear, SoftlyRoundedLinear, SteppedLinear

GRIDS = [IntGrid(3, 16), IntGrid(2, None, symmetric=True), IntGrid(3, 16, True, True), IntGrid(2, 16, float_zero=True)]
every_grid = pytest.mark.parametrize("grid", GRIDS, ids=str)


@pytest.fixture
def layer(generator):
    """As the walk leaves it for tunings."""

    def make(grid, solver=RTN(), hessian=None) -> QuantizedLinear:
        linear = nn.Linear(32, 8)
        linear.weight.data = torch.randn(8, 32, generator=generator)
        weight = linear.weight.data.clone()
        found = QuantizedLinear.from_linear(linear, Scheme(grid), grid.pack(*solver.solve(weight, grid, hessian)))
        found.original = weight
        return found

    return make


@every_grid
def test_learned_steps_start_as_rounding_to_nearest(grid, layer):
    made = layer(grid)
    stepped = SteppedLinear(made)
    torch.testing.assert_close(stepped.weight, made.dequantize())
    before = made.dequantize()
    assert torch.equal(stepped.store().dequantize(), before)


def test_the_gradient_of_a_step_is_that_of_the_paper(layer, generator):
    """Of each weight round(w/s) - w/s, beyond the levels the outermost one; their sum over sqrt(numel * qmax)."""
    stepped = SteppedLinear(layer(IntGrid(3, 16, symmetric=True)))
    stepped.scale.data *= 0.5
    given = torch.randn(8, 32, generator=generator)
    stepped.weight.backward(given)
    steps = stepped.original.unflatten(-1, (2, 16)) / stepped.scale.detach()[..., None]
    of_weights = torch.where(steps < -4, -4.0, torch.where(steps > 3, 3.0, steps.round() - steps))
    assert (steps.abs() > 4).any()
    expected = (of_weights * given.unflatten(-1, (2, 16))).sum(-1) / (16 * 3) ** 0.5
    torch.testing.assert_close(stepped.scale.grad, expected, rtol=1e-4, atol=1e-5)


@every_grid
def test_ranges_that_are_not_clipped_are_those_of_rounding_to_nearest(grid, layer):
    made = layer(grid)
    before, clipped = made.dequantize(), ClippedLinear(made)
    # sigmoid(20) is one in float32
    clipped.lower.data.fill_(20.0)
    clipped.upper.data.fill_(20.0)
    assert torch.equal(clipped.store().dequantize(), before)


@every_grid
def test_what_a_clipped_layer_computes_with_is_what_it_stores(grid, layer):
    clipped = ClippedLinear(layer(grid))
    assert clipped.lower.sigmoid().allclose(torch.tensor(0.982), atol=1e-3)
    weight = clipped.weight.detach()
    stored = clipped.store().dequantize()
    # scales are rounded to float16, and now and then a weight half-way falls to the other side
    assert ((weight - stored).abs() <= 2**-8 * weight.abs().max()).float().mean() > 0.97


@every_grid
def test_gradients_reach_both_ends_of_a_range(grid, layer, generator):
    clipped = ClippedLinear(layer(grid))
    clipped.weight.backward(torch.randn(8, 32, generator=generator))
    for end in (clipped.lower, clipped.upper):
        assert end.grad.isfinite().all()
        assert (end.grad != 0).any()


@every_grid
def test_soft_rounding_starts_half_way_from_the_chosen_code_to_the_weight(grid, layer):
    made = layer(grid)
    soft, before = SoftlyRoundedLinear(made), made.dequantize()
    # beyond the outermost level there is nothing to go to, and nobody stands on a level
    between = (soft.h - soft.h.round()).abs() > 0.01
    assert between.float().mean() > 0.7
    half_way = soft.grouped(soft.original + before) / 2
    torch.testing.assert_close(soft.grouped(soft.weight)[between], half_way[between], rtol=1e-4, atol=1e-5)
    assert torch.equal(soft.store().dequantize(), before)


@every_grid
def test_soft_rounding_ends_at_one_of_two_neighbours(grid, layer):
    made = layer(grid)
    soft, ends = SoftlyRoundedLinear(made), []
    chosen = soft.codes.int()
    for v in (-10.0, 10.0):
        soft.v.data.fill_(v)
        soft.store()
        ends.append(soft.codes.int())
    assert torch.equal(ends[1] - ends[0], torch.ones(8, 32, dtype=torch.int32))
    assert ((chosen == ends[0]) | (chosen == ends[1])).all()


def test_after_gptq_its_code_stays_one_of_the_two(layer, generator):
    x = torch.randn(256, 32, generator=generator) @ torch.randn(32, 32, generator=generator)
    made = layer(IntGrid(3, 16), GPTQ(), x.T @ x / len(x))
    soft = SoftlyRoundedLinear(made)
    codes, lower = soft.grouped(soft.codes.float()), soft.lower
    assert ((codes == lower) | (codes == lower + 1)).all()
    before = made.dequantize()
    assert torch.equal(soft.store().dequantize(), before)


@pytest.mark.parametrize("kind", [SteppedLinear, ClippedLinear, SoftlyRoundedLinear])
def test_other_grids_are_refused(kind, layer):
    with pytest.raises(TypeError, match=rf"{kind.__name__}.*NormalFloatGrid.*use an IntGrid"):
        kind(layer(NormalFloatGrid(16)))
    made = layer(IntGrid(3, 16))
    made.original = None
    with pytest.raises(ValueError, match="only within `quantize`"):
        kind(made)


def held_out_error(make_model, recipe, ids, held_out) -> float:
    """|block(x) - y|^2 / |y|^2 of the first of two blocks, on inputs that nothing was learnt from."""
    with torch.no_grad():
        dense = make_model()(held_out, output_hidden_states=True).hidden_states[1]
        model = quantize(make_model(), recipe, ids, keep=["layers.1"])
        output = model(held_out, output_hidden_states=True).hidden_states[1]
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    assert all(layer.original is None for layer in layers)
    return float((output - dense).square().sum() / dense.square().sum())


@pytest.fixture
def held_out(generator):
    return torch.randint(3, 97, (8, 32), generator=generator.manual_seed(1))


@pytest.fixture
def batches(ids):
    """The calibration data in eight, so that steps see different parts of it."""
    return list(ids.split(2))


@pytest.mark.parametrize("tuning", [LearnedStep(), LearnedClip()], ids=lambda tuning: type(tuning).__name__)
def test_learned_steps_and_ranges_lose_less_than_rounding(tuning, make_model, batches, held_out):
    rtn = Recipe(IntGrid(2, 32))
    assert held_out_error(make_model, replace(rtn, tuning=(tuning,)), batches, held_out) < 0.9 * held_out_error(
        make_model, rtn, batches, held_out
    )


def test_block_reconstruction_loses_less_than_the_layer_by_layer_solution_that_it_starts_from(
    make_model, batches, held_out
):
    rtn = Recipe(IntGrid(2, 32))
    layerwise = replace(rtn, solver=LearnedRounding())
    blockwise = replace(layerwise, tuning=(BlockReconstruction(200),))
    errors = [held_out_error(make_model, recipe, batches, held_out) for recipe in (blockwise, layerwise, rtn)]
    assert errors[0] < 0.98 * errors[1] < errors[2]


def test_columns_of_different_sizes_are_learnt(make_model, batches, held_out):
    """One alpha for a row cannot stand for them, alpha times a column can."""

    def of_unequal_columns():
        model, generator = make_model(), torch.Generator().manual_seed(2)
        for name, parameter in model.named_parameters():
            if "proj" in name:
                parameter.data *= (0.7 * torch.randn(parameter.shape[1], generator=generator)).exp()
        return model

    start = Recipe(MaskedBinary(), WeightedRTN())
    before = held_out_error(of_unequal_columns, start, batches, held_out)
    learnt = replace(start, tuning=(BlockScales(),))
    assert held_out_error(of_unequal_columns, learnt, batches, held_out) < 0.7 * before
