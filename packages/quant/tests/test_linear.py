"""QuantizedLinear: what it stores, what it computes."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tersor.quant.grid import Grid, IntGrid, bits_per_weight
from tersor.quant.linear import QuantizedLinear
from tersor.quant.scheme import Scheme
from tersor.quant.solver import RTN

GRIDS = [
    IntGrid(bits, group_size, symmetric)
    for bits in range(1, 9)
    for group_size in (16, 40, None)
    for symmetric in (False, True)
] + [IntGrid(8, None, symmetric=True, restricted=True), IntGrid(3, 40, float_zero=True)]
every_grid = pytest.mark.parametrize("grid", GRIDS, ids=str)


def quantized(linear: nn.Linear, grid: Grid) -> QuantizedLinear:
    result = RTN().solve(linear.weight.detach().float(), grid, None)
    return QuantizedLinear.from_linear(linear, Scheme(grid), grid.pack(*result))


@pytest.fixture
def linear(generator) -> nn.Linear:
    layer = nn.Linear(80, 7)
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return layer


@every_grid
def test_it_decodes_to_what_the_grid_decodes(grid, linear):
    weight = linear.weight.detach()
    codes, params = RTN().solve(weight, grid, None)
    layer = quantized(linear, grid)
    assert torch.equal(layer.dequantize(), grid.decode(codes, params))
    for stored, given in zip(grid.unpack(layer.stored(), (7, 80)), (codes, params)):
        assert all(torch.equal(*pair) for pair in zip(stored, given))
    assert layer.weight_shape == (7, 80)


@every_grid
def test_bits_per_weight_are_those_of_the_stored_bytes(grid, linear):
    layer = quantized(linear, grid)
    assert bits_per_weight(grid, 7, 80) == 8 * layer.nbytes / (7 * 80)
    assert layer.nbytes == sum(tensor.nbytes for name, tensor in layer.state_dict().items() if name != "bias")


def test_four_bits_in_groups_of_64_take_less_than_30_percent_of_bfloat16():
    # 4 bits of code, and in each group a scale of 16 bits and a zero point of 4
    assert bits_per_weight(IntGrid(4, 64), 256, 512) == 4 + 20 / 64
    assert bits_per_weight(IntGrid(4, 64, symmetric=True), 256, 512) == 4 + 16 / 64
    assert bits_per_weight(IntGrid(4, 64), 256, 512) <= 0.3 * 16


@every_grid
@pytest.mark.parametrize("shape", [(80,), (1, 80), (2, 3, 80), (0, 80)])
def test_it_multiplies_by_the_decoded_weight(grid, shape, linear, generator):
    layer, x = quantized(linear, grid), torch.randn(shape, generator=generator)
    # 80 products, summed in float32 in another order
    torch.testing.assert_close(layer(x), F.linear(x, layer.dequantize(), linear.bias), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_it_answers_in_the_dtype_that_it_is_asked_in(dtype, linear, generator):
    layer, x = quantized(linear, IntGrid(4, 16)), torch.randn(3, 80, generator=generator).to(dtype)
    y = layer.to(dtype)(x)
    assert y.dtype == dtype
    expected = F.linear(x.float(), layer.dequantize(), linear.bias.float())
    torch.testing.assert_close(y.float(), expected, rtol=2**-6, atol=2**-3)  # bf16 mantissa, sums of 80


@every_grid
def test_no_cast_changes_the_weight(grid, linear):
    layer = quantized(linear, grid)
    weight = layer.dequantize()
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert torch.equal(layer.to(dtype).dequantize(), weight)


def test_a_linear_without_bias_stays_without(generator):
    linear = nn.Linear(16, 4, bias=False)
    layer = quantized(linear, IntGrid(4, 8))
    assert layer.bias is None
    assert set(layer.state_dict()) == {"codes", "scale_bits", "zero_points"}
    assert layer.to_linear().bias is None


def test_symmetric_grids_store_no_zero_points(linear):
    assert set(quantized(linear, IntGrid(4, 16, symmetric=True)).state_dict()) == {"codes", "scale_bits", "bias"}


@every_grid
def test_state_dicts_and_copies_hold_the_layer(grid, linear, generator):
    layer, x = quantized(linear, grid), torch.randn(3, 80, generator=generator)
    other = QuantizedLinear(80, 7, True, Scheme(grid))
    other.load_state_dict(layer.state_dict())
    for copied in (other, copy.deepcopy(layer)):
        assert torch.equal(copied(x), layer(x))


def test_it_becomes_a_plain_linear_again(linear, generator):
    layer, x = quantized(linear, IntGrid(4, 16)), torch.randn(3, 80, generator=generator)
    plain = layer.to_linear()
    assert torch.equal(plain.weight, layer.dequantize())
    torch.testing.assert_close(plain(x), layer(x), rtol=1e-4, atol=1e-4)
    assert layer.to_linear(torch.bfloat16).weight.dtype == torch.bfloat16


def test_gradients_flow_to_the_input(linear, generator):
    layer, x = quantized(linear, IntGrid(4, 16)), torch.randn(3, 80, generator=generator, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x).sum(), x)
    torch.testing.assert_close(gradient, layer.dequantize().sum(0).expand(3, -1), rtol=1e-4, atol=1e-4)


def test_zero_points_loaded_after_a_call_are_used(linear, generator):
    layer, x = quantized(linear, IntGrid(4, 16)), torch.randn(3, 80, generator=generator)
    linear.weight.data += 0.3
    other = quantized(linear, IntGrid(4, 16))
    before, expected = layer(x), other(x)
    layer.load_state_dict(other.state_dict())
    assert not torch.equal(before, expected)
    assert torch.equal(layer(x), expected)
    assert layer.to("meta")(x.to("meta")).device.type == "meta"


def test_a_call_in_inference_mode_does_not_stop_later_gradients(linear, generator):
    layer, x = quantized(linear, IntGrid(4, 16)), torch.randn(3, 80, generator=generator)
    with torch.inference_mode():
        inferred = layer(x)
    y = layer(x.requires_grad_())
    y.sum().backward()
    assert torch.equal(y, inferred)


def test_it_says_what_it_is(linear):
    assert repr(quantized(linear, IntGrid(4, 16))) == (
        "QuantizedLinear(in_features=80, out_features=7, bias=True, "
        "grid=IntGrid(bits=4, group_size=16, symmetric=False, restricted=False, float_zero=False))"
    )
