"""Axis grid: what holds for every grid."""

import json

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from tersor.quant import Recipe, quantize
from tersor.quant.grid import (
    AdditiveGrid,
    BinaryGrid,
    BipolarInt,
    BitBalance,
    DoubleNormalFloatGrid,
    DualBinary,
    DualGrain,
    FloatGrid,
    GaussianGrid,
    GaussianPairGrid,
    IntGrid,
    KMeansGrid,
    MaskedBinary,
    MXFP4Grid,
    NormalFloatGrid,
    NVFP4Grid,
    ScalarGrid,
    SeedGrid,
    SignLowRankStack,
    bits_per_weight,
)
from tersor.quant.grid.decoded import Decoded
from tersor.quant.linear import QuantizedLinear
from tersor.quant.scheme import Scheme
from tersor.quant.solver import GPTQ, RTN, relative_error

WITH_ZERO = [
    *(FloatGrid(form, 16) for form in ("e4m3", "e5m2", "e2m1", "e2m3", "e3m2")),
    FloatGrid("e4m3"),
    FloatGrid("e4m3", None, None),
    FloatGrid("e4m3", 32, 4),
    MXFP4Grid(),
    MXFP4Grid("floor"),
    NVFP4Grid(),
    NormalFloatGrid(32),
    DoubleNormalFloatGrid(32, 8),
    IntGrid(3, 32),
    IntGrid(4, None, symmetric=True),
    DualBinary(32),
    BitBalance(5, 32),
    BitBalance(3),
]
SCALAR = [
    *WITH_ZERO,
    *(GaussianGrid(n, 32) for n in (2, 16, 64)),
    KMeansGrid(2),
    KMeansGrid(3, 32),
    KMeansGrid(4, per_tensor=True),
    KMeansGrid(5, per_tensor=True),
    BinaryGrid(32),
    BinaryGrid(32, centred=True),
    *(BipolarInt(bits, size) for bits, size in ((1, 32), (3, None), (8, 16))),
]
GRIDS = [
    *SCALAR,
    *(GaussianPairGrid(n, 32) for n in (16, 128, 256)),
    GaussianPairGrid(64, None),
    SeedGrid(8, 3, 10),
    AdditiveGrid(1, 5, 4),
    DualGrain(32),
    MaskedBinary(),
    SignLowRankStack(1, 4),
]
OUT, IN = 7, 96
every_grid = pytest.mark.parametrize("grid", GRIDS, ids=str)
every_scalar_grid = pytest.mark.parametrize("grid", SCALAR, ids=str)


@pytest.fixture
def weight(generator) -> Tensor:
    return 0.05 * torch.randn(OUT, IN, generator=generator)


@pytest.fixture
def x(generator) -> Tensor:
    return torch.randn(2, 3, IN, generator=generator)


def rounded(weight: Tensor, grid) -> Tensor:
    params = grid.fit(weight)
    return grid.decode(grid.encode(weight, params), params)


def all_levels(grid, params) -> Tensor:
    """(codes, OUT, IN): what every code means for every weight."""
    codes = torch.arange(2**grid.bits).to(torch.uint8)[:, None, None].expand(-1, OUT, IN)
    return torch.stack([grid.decode(code.contiguous(), params) for code in codes])


@every_grid
def test_decoded_weights_are_fixed_points(grid, weight):
    params = grid.fit(weight)
    decoded = grid.decode(grid.encode(weight, params), params)
    assert torch.equal(grid.decode(grid.encode(decoded, params), params), decoded)


@every_scalar_grid
def test_no_level_is_nearer_than_the_one_chosen(grid, weight):
    params = grid.fit(weight)
    error = (grid.decode(grid.encode(weight, params), params) - weight).abs()
    nearest = (all_levels(grid, params) - weight).abs().nan_to_num(torch.inf).amin(0)
    # ties: a division, a level and their sum are rounded
    assert (error <= nearest + 2**-22 * weight.abs().max()).all()


@every_scalar_grid
def test_what_lies_beyond_the_levels_becomes_the_outermost_one(grid, weight):
    params = grid.fit(weight)
    levels = all_levels(grid, params)
    for sign in (1, -1):
        far = grid.decode(grid.encode(torch.full_like(weight, sign * 1e9), params), params)
        assert torch.equal(far, sign * (sign * levels).nan_to_num(-torch.inf).amax(0))


@pytest.mark.parametrize("grid", WITH_ZERO, ids=str)
def test_zero_is_a_level(grid, weight):
    weight[:, ::3] = 0
    assert (rounded(weight, grid)[:, ::3] == 0).all()


@every_grid
def test_zeros_stay_zero_and_nothing_becomes_nan(grid, weight):
    assert (rounded(torch.zeros_like(weight), grid) == 0).all()
    weight[2] = 0
    weight[3:, 32:64] = 0
    decoded = rounded(weight, grid)
    assert decoded.isfinite().all()
    assert (decoded[2] == 0).all() or getattr(grid, "per_tensor", False)
    assert rounded(torch.full_like(weight, 1e-30), grid).abs().max() <= 2**-16


@every_grid
def test_a_constant_moves_through_if_it_is_a_power_of_two(grid, weight):
    assert torch.equal(rounded(4 * weight, grid), 4 * rounded(weight, grid))


@every_grid
def test_rows_are_fitted_by_themselves_where_the_grid_says_so(grid, weight):
    together = rounded(weight, grid)
    alone = torch.cat([rounded(row[None], grid) for row in weight])
    if grid.per_row:
        assert torch.equal(together, alone)
        assert all(len(p) == OUT for p in (grid.encode(weight, grid.fit(weight)), *grid.fit(weight)))
    elif not isinstance(grid, FloatGrid):
        # (that of a float may by chance be the same)
        assert not torch.equal(together, alone)


@every_grid
def test_codes_and_parameters_come_back_from_what_is_stored(grid, weight):
    params = grid.fit(weight)
    codes = grid.encode(weight, params)
    stored = grid.pack(codes, params)
    assert {name: (tuple(b.shape), b.dtype) for name, b in stored.items()} == grid.layout(OUT, IN)
    assert not any(buffer.is_floating_point() for buffer in stored.values())
    again, again_params = grid.unpack(stored, (OUT, IN))
    assert torch.equal(again, codes)
    assert type(again_params) is type(params)
    for ours, theirs in zip(params, again_params):
        assert torch.equal(ours, theirs)
        assert ours.dtype == theirs.dtype
    assert bits_per_weight(grid, OUT, IN) == 8 * sum(b.nbytes for b in stored.values()) / weight.numel()


@every_grid
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_products_are_those_with_the_decoded_weight(grid, dtype, weight, x):
    params = grid.fit(weight)
    codes = grid.encode(weight, params)
    stored, decoded = grid.pack(codes, params), grid.decode(codes, params)
    # the sum of 96 products, in float32 (or float64) in another order; then the mantissa of the result
    tolerance = {"rtol": 2**-8 if dtype == torch.bfloat16 else 1e-4, "atol": 1e-5}
    for multiplied in (grid, Decoded(grid)):
        prepared = multiplied.prepare(stored, (OUT, IN))
        for inputs in (x.to(dtype), x[0, 0].to(dtype), x[:0].to(dtype)):
            y = multiplied.linear(inputs, *prepared)
            assert y.dtype == dtype
            expected = F.linear(inputs.double(), decoded.double())
            torch.testing.assert_close(y.double(), expected, **tolerance)


@every_grid
def test_gradients_flow_to_the_input(grid, weight, x):
    params = grid.fit(weight)
    codes = grid.encode(weight, params)
    prepared = grid.prepare(grid.pack(codes, params), (OUT, IN))
    y = grid.linear(x.requires_grad_(), *prepared)
    factors = torch.linspace(-1, 1, y.numel()).view_as(y)
    (gradient,) = torch.autograd.grad(y, x, factors)
    torch.testing.assert_close(gradient, factors @ grid.decode(codes, params), rtol=1e-4, atol=1e-5)


@every_grid
def test_layers_store_it_and_no_cast_changes_it(grid, weight, x):
    linear = nn.Linear(IN, OUT)
    linear.weight.data = weight
    layer = QuantizedLinear.from_linear(linear, Scheme(grid), grid.pack(*RTN().solve(weight, grid, None)))
    decoded = rounded(weight, grid)
    assert torch.equal(layer.dequantize(), decoded)
    assert bits_per_weight(grid, OUT, IN) == 8 * layer.nbytes / weight.numel()
    other = QuantizedLinear(IN, OUT, True, Scheme(grid))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert torch.equal(layer.to(dtype).dequantize(), decoded)


@every_grid
def test_settings_survive_json(grid):
    scheme = Scheme(grid)
    assert Scheme.from_dict(json.loads(json.dumps(scheme.to_dict()))) == scheme


@pytest.mark.parametrize("grids", [GRIDS[i::3] for i in range(3)], ids=["1", "2", "3"])
def test_checkpoints_come_back_bit_for_bit(grids, make_model, ids, tmp_path):
    """Each layer of one model has a grid of its own."""
    model = make_model("qwen2")
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "layers" in name]
    assert len(grids) <= len(names)
    allocation = dict(zip(names, grids))
    model = quantize(model, Recipe(IntGrid(2, 32)), allocation=allocation)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {name: loaded.get_submodule(name).scheme.grid for name in allocation} == allocation
    with torch.no_grad():
        assert torch.equal(loaded(ids[:2]).logits, model(ids[:2]).logits)


@pytest.fixture
def hessian(generator) -> Tensor:
    """Second moments of correlated inputs."""
    x = torch.randn(4 * IN, IN, generator=generator) @ torch.randn(IN, IN, generator=generator)
    return x.T @ x / len(x)


@every_scalar_grid
def test_gptq_is_rounding_where_inputs_are_uncorrelated(grid, weight):
    assert isinstance(grid, ScalarGrid)
    codes, params = GPTQ(order="none").solve(weight, grid, torch.eye(IN))
    assert torch.equal(grid.decode(codes, params), rounded(weight, grid))


@every_scalar_grid
@pytest.mark.parametrize("order", ["act", "none"])
def test_gptq_loses_less_than_rounding_on_it(grid, order, hessian, generator):
    weight = torch.randn(32, IN, generator=generator)
    loss = {
        solver: relative_error(weight, grid.decode(*solver.solve(weight, grid, hessian)), hessian)
        for solver in (RTN(), GPTQ(order=order))
    }
    assert loss[GPTQ(order=order)] < loss[RTN()]


@pytest.mark.parametrize("grid", [GaussianPairGrid(16, 32), SeedGrid(8, 3, 8)], ids=str)
def test_gptq_refuses_codes_of_several_weights(grid, weight):
    with pytest.raises(TypeError, match=f"GPTQ.*{type(grid).__name__}"):
        GPTQ().solve(weight, grid, torch.eye(IN))


@every_grid
def test_widths_that_do_not_suit_are_refused(grid):
    if isinstance(grid, MaskedBinary | SignLowRankStack) or getattr(grid, "group_size", 8) is None:
        grid.check(OUT, 98)
        return
    with pytest.raises(ValueError, match="in = 98 is not a multiple of .* = .*; use .* = .*"):
        grid.check(OUT, 98)


@pytest.mark.parametrize("kind", [FloatGrid, NormalFloatGrid, GaussianGrid, GaussianPairGrid, KMeansGrid, BinaryGrid])
def test_group_sizes_are_checked(kind):
    with pytest.raises(ValueError, match="group_size must be positive"):
        kind(group_size=0)


@every_scalar_grid
def test_weights_beyond_the_scales_are_refused(grid, weight):
    largest = torch.finfo(torch.float32).max
    if isinstance(grid, MXFP4Grid | NVFP4Grid | DoubleNormalFloatGrid):
        # whose scales are, or go with, numbers of float32's range
        assert rounded(weight * 2.0**100, grid).isfinite().all()
        return
    with pytest.raises(ValueError, match=r"beyond float16; divide them by a constant"):
        grid.fit(torch.full_like(weight, largest / 1e8))


# relative squared errors of normal weights, known from theory or long runs to 2%
@pytest.mark.parametrize(
    ("grid", "expected"),
    [
        (IntGrid(4, 64), 0.00829),
        (NormalFloatGrid(64), 0.00846),
        (DoubleNormalFloatGrid(64), 0.00846),
        (NVFP4Grid(), 0.00904),
        (MXFP4Grid(), 0.01254),
        (GaussianGrid(16, 128), 0.0095),
        (GaussianPairGrid(256, 128), 0.00775),
        (GaussianPairGrid(64, 128), 0.0295),
        (GaussianPairGrid(16, 128), 0.108),
        # Lloyd and Max; the mean of half a normal distribution
        (KMeansGrid(3, per_tensor=True), 0.03454),
        (BinaryGrid(None), 1 - 2 / torch.pi),
    ],
    ids=str,
)
def test_gaussian_error_is_the_known_one(grid, expected, generator):
    weight = torch.randn(256, 2048, generator=generator)
    assert relative_error(weight, rounded(weight, grid), None) == pytest.approx(expected, rel=0.02)
