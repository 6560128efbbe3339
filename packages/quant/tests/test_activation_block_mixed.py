"""Inputs with more bits in the blocks of channels that hold outliers."""

import pytest
import torch
from torch import nn

from tersor.quant import Recipe, quantize, recipes
from tersor.quant.activation import BlockMixedActivation, CalibratedActivation, IntActivation
from tersor.quant.grid import IntGrid
from tersor.quant.linear import QuantizedLinear
from tersor.quant.scheme import Scheme
from tersor.quant.solver import RTN

MIXED = BlockMixedActivation(16)


@pytest.fixture
def x(generator) -> torch.Tensor:
    """Outliers in the channels 18 and 63."""
    x = torch.randn(3, 5, 64, generator=generator)
    x[..., [18, 63]] *= 50
    return x


@pytest.fixture
def fitted(x) -> BlockMixedActivation:
    return MIXED.fit(x.abs().amax((0, 1)))


def test_blocks_with_outliers_are_found(x, fitted):
    assert fitted.high_groups == (1, 3)
    assert MIXED.fit(torch.ones(64)).high_groups == ()
    # zeros that are added are none of the channels
    assert MIXED.fit(torch.ones(8), 8).high_groups == ()
    # a dead median: whatever is not zero sticks out
    assert MIXED.fit(torch.eye(64)[20]).high_groups == (1,)


def test_no_input_is_missed_by_more_than_half_a_step_of_its_block(x, fitted):
    codes, scale = fitted.encode(x)
    grouped = x.unflatten(-1, (4, 16))
    tops = torch.tensor([7, 127, 7, 127])
    torch.testing.assert_close(scale, grouped.abs().amax(-1) / tops)
    assert (codes.unflatten(-1, (4, 16)).abs().amax((0, 1, 3)) == tops).all()
    error = (fitted.quantise(x) - x).unflatten(-1, (4, 16)).abs()
    # float32: a quotient is off by up to 127 * 2^-24 steps, the product by as much
    assert (error <= scale[..., None] * (0.5 + 2**-15)).all()


@pytest.mark.parametrize(("tau", "bits"), [(1e9, 4), (1e-9, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_all_blocks_alike_it_is_the_plain_one(tau, bits, dtype, x):
    mixed = BlockMixedActivation(16, tau=tau).fit(x.abs().amax((0, 1)))
    assert torch.equal(mixed.quantise(x.to(dtype)), IntActivation(bits, 16).quantise(x.to(dtype)))


def test_products_are_those_of_integers_block_by_block(x, fitted, generator):
    """What a kernel would add up: integers within a block, scaled by those of the token and of the weights."""
    linear, grid = nn.Linear(64, 24, bias=False), IntGrid(4, 16, symmetric=True)
    linear.weight.data = torch.randn(24, 64, generator=generator)
    weight, params = RTN().solve(linear.weight.detach(), grid, None)
    quantized = QuantizedLinear.from_linear(linear, Scheme(grid, activation=fitted), grid.pack(weight, params))
    codes, scale = fitted.encode(x)
    expected = torch.zeros(3, 5, 24, dtype=torch.float64)
    for block in range(4):
        here = slice(16 * block, 16 * block + 16)
        sums = codes[..., here].long() @ (weight[:, here].long() - 8).T
        expected += sums * scale[..., block, None].double() * params.scale[:, block].double()
    torch.testing.assert_close(quantized(x).double(), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_each_layer_has_its_blocks_and_keeps_them(make_model, ids, tmp_path):
    model = make_model()
    for block in model.model.layers:
        block.mlp.up_proj.weight.data[40] *= 1e3
        block.mlp.down_proj.weight.data[:, 40] /= 1e3
    recipe = Recipe(IntGrid(4, 32, symmetric=True), activation=BlockMixedActivation(32))
    model = quantize(model, recipe, ids)
    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedLinear):
            assert layer.scheme.activation.high_groups == ((1,) if "down_proj" in name else ()), name
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_the_recipe_has_one_size_of_blocks_for_inputs_and_weights():
    recipe = recipes.comet(64)
    assert recipe.grid.group_size == recipe.activation.group_size == 64


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"low_bits": 1}, "low_bits must be 2 to 8, got 1"),
        ({"high_bits": 9}, "high_bits must be 2 to 8, got 9"),
        ({"group_size": 0}, "group_size must be positive"),
        ({"tau": 0.0}, "tau must be positive"),
    ],
)
def test_bad_settings_are_named(settings, says):
    with pytest.raises(ValueError, match=says):
        BlockMixedActivation(**settings)


def test_unknown_blocks_and_widths_that_do_not_divide_are_named(x):
    with pytest.raises(ValueError, match="does not know its outliers yet"):
        MIXED.quantise(x)
    with pytest.raises(ValueError, match="in = 64 is not a multiple of group_size = 48"):
        BlockMixedActivation(48).check(IntGrid(), 64)


def test_it_is_a_calibrated_activation():
    assert isinstance(MIXED, CalibratedActivation)
