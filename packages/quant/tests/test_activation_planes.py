"""Inputs for products of bit planes: exact integers on both sides, for every pair of widths."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tersor.kernels import bipolar_linear, bitplane_linear
from tersor.quant import quantize, recipes
from tersor.quant.activation import Activation, BipolarActivation, PlaneActivation
from tersor.quant.grid import BipolarInt, BitBalance, IntGrid, NormalFloatGrid
from tersor.quant.linear import QuantizedLinear
from tersor.quant.scheme import Scheme
from tersor.quant.solver import RTN

a_few = settings(max_examples=15, deadline=None, derandomize=True)
tokens = st.lists(st.lists(st.floats(-1e4, 1e4, width=32), min_size=8, max_size=8), min_size=1, max_size=4).map(
    torch.tensor
)
WITH_PLANES = [
    *((BipolarInt(bits, size), BipolarActivation) for bits, size in ((1, None), (3, 24), (8, 32))),
    *((IntGrid(bits, size), PlaneActivation) for bits, size in ((1, None), (2, 32), (3, 24), (8, None))),
    (IntGrid(4, 32, symmetric=True), PlaneActivation),
    *((BitBalance(levels, size), PlaneActivation) for levels, size in ((3, 32), (5, None))),
]
WITHOUT = [
    (IntGrid(4, 32, float_zero=True), PlaneActivation(8)),
    (BipolarInt(4, 32), PlaneActivation(4)),
    (NormalFloatGrid(32), PlaneActivation(8)),
    (IntGrid(4, 32), BipolarActivation(4)),
]
OPS = {BipolarActivation: "bipolar.bipolar_linear", PlaneActivation: "planes.bitplane_linear"}


def layer(grid, activation, linear: nn.Linear) -> QuantizedLinear:
    result = RTN().solve(linear.weight.detach().float(), grid, None)
    return QuantizedLinear.from_linear(linear, Scheme(grid, activation=activation), grid.pack(*result))


@pytest.fixture
def linear(generator) -> nn.Linear:
    linear = nn.Linear(96, 40)
    linear.weight.data = torch.randn(40, 96, generator=generator)
    return linear


@pytest.fixture
def x(generator) -> Tensor:
    return torch.randn(3, 5, 96, generator=generator) + 0.5


@pytest.mark.parametrize("bits", range(1, 9))
@a_few
@given(x=tokens)
def test_no_input_is_missed_by_more_than_half_a_step(bits, x):
    for activation, half in ((BipolarActivation(bits), 1.0), (PlaneActivation(bits), 0.5)):
        scale = activation.encode(x)[-1][..., None]
        # the zero point is rounded, too: at an end, half a step more may be cut off
        cut = 0.5 if half == 0.5 else 0.0
        # float32: quotients of up to 255 steps
        assert ((activation.quantise(x) - x).abs() <= scale * (half + cut + 2**-14)).all()


@pytest.mark.parametrize("bits", range(1, 9))
def test_zero_stays_zero_with_a_zero_point_only(bits, x):
    x[..., ::2] = 0
    assert (PlaneActivation(bits).quantise(x)[..., ::2] == 0).all()
    assert (BipolarActivation(bits).quantise(x)[..., ::2] != 0).all()


@pytest.mark.parametrize("activation", [BipolarActivation(4), PlaneActivation(4)], ids=str)
def test_each_token_is_rounded_by_itself_and_zeros_stay_zeros(activation, x):
    alone = torch.stack([activation.quantise(token) for token in x.flatten(0, 1)]).view_as(x)
    assert torch.equal(activation.quantise(x), alone)
    assert torch.equal(activation.quantise(torch.zeros(2, 8)).abs(), torch.zeros(2, 8))
    assert activation.quantise(torch.zeros(0, 8)).shape == (0, 8)


def test_inputs_on_one_side_of_zero_have_all_levels(x):
    """Why zero points: behind a ReLU, half of the symmetric levels would never occur."""
    x = x.relu()
    error = {a: (a.quantise(x) - x).square().mean() for a in (PlaneActivation(4), BipolarActivation(4))}
    assert error[PlaneActivation(4)] < 0.5 * error[BipolarActivation(4)]


@pytest.mark.parametrize("bits", [1, 2, 5, 8])
@pytest.mark.parametrize(("grid", "kind"), WITH_PLANES, ids=str)
@torch.no_grad()
def test_products_are_those_of_planes(grid, kind, bits, linear, x, monkeypatch):
    taken = []
    op = bipolar_linear if kind is BipolarActivation else bitplane_linear
    monkeypatch.setattr(f"tersor.quant.activation.{OPS[kind]}", lambda *args: taken.append(args) or op(*args))
    quantized = layer(grid, kind(bits), linear)
    y = quantized(x)
    assert len(taken) == 1
    expected = kind(bits).quantise(x).double() @ quantized.dequantize().double().T + linear.bias.double()
    # sums of a group are exact; the rounding of the decoded inputs, of scales and of their sums remain
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(("grid", "activation"), WITHOUT, ids=str)
@torch.no_grad()
def test_other_layers_multiply_the_rounded_input_with_the_decoded_weight(grid, activation, linear, x):
    quantized = layer(grid, activation, linear)
    expected = activation.quantise(x) @ quantized.dequantize().T + linear.bias
    torch.testing.assert_close(quantized(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@torch.no_grad()
def test_other_dtypes(dtype, linear, x):
    for grid, kind in ((BipolarInt(2), BipolarActivation), (BitBalance(), PlaneActivation)):
        quantized = layer(grid, kind(8), linear.to(dtype))
        y, expected = quantized(x.to(dtype)), quantized.float()(x.to(dtype).float())
        assert y.dtype == dtype
        torch.testing.assert_close(y.float(), expected, rtol=2**-7, atol=2**-7 * float(expected.abs().max()))


@torch.no_grad()
def test_more_bits_come_closer(linear, x):
    for grid, kind in ((BipolarInt(3), BipolarActivation), (IntGrid(3, 32), PlaneActivation)):
        exact = layer(grid, None, linear)(x)
        errors = [float((layer(grid, kind(bits), linear)(x) - exact).norm()) for bits in range(1, 9)]
        assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize(
    "recipe", [recipes.bipolar_int(2, 4, 32), recipes.bipolar_int(6, None, None)], ids=["w2a4", "w6"]
)
@torch.no_grad()
def test_bipolar_models_come_back(recipe, make_model, ids, tmp_path):
    model = quantize(make_model(), recipe)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("kind", [BipolarActivation, PlaneActivation])
def test_bad_settings_are_named(kind):
    assert isinstance(kind(), Activation)
    for bits in (0, 9):
        with pytest.raises(ValueError, match=f"bits must be 1 to 8, got {bits}"):
            kind(bits)


@pytest.mark.parametrize(("grid", "kind"), [(BipolarInt(2), BipolarActivation), (IntGrid(2, None), PlaneActivation)])
def test_groups_whose_sums_may_overflow_are_refused(grid, kind):
    kind().check(grid, 2**15)
    with pytest.raises(
        ValueError, match="sums of 32776 products may not fit in int32; use a group_size of at most 32768"
    ):
        kind().check(grid, 2**15 + 8)
