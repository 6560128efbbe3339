"""DualBinary: two binary matrices."""

import pytest
import torch

from tersor.kernels import unpack_bits
from tersor.quant.grid import DualBinary, DualBinaryParams, bits_per_weight
from tersor.quant.solver import GPTQ, RTN, ClipSearch, relative_error


def test_it_starts_as_the_quantiser_with_four_even_levels(generator):
    weight, grid = torch.randn(16, 128, generator=generator), DualBinary(32)
    params = grid.fit(weight)
    assert torch.equal(params.a1, -2 * params.a2)
    s = -params.a2.float()[..., None]
    levels = (weight.unflatten(-1, (4, 32)) / s).round().clamp(-1, 2) * s
    assert torch.equal(grid.decode(grid.encode(weight, params), params), levels.flatten(-2))
    # as of an integer grid: half a step, and what a float16 is rounded by
    assert ((levels.flatten(-2) - weight).abs() <= 0.501 * s.repeat_interleave(32, -1).flatten(-2)).all()


def test_two_bit_planes_are_the_weight(generator):
    weight, grid = torch.randn(16, 96, generator=generator), DualBinary(32)
    codes, params = RTN().solve(weight, grid, None)
    stored = grid.pack(codes, params)
    b1, b2 = unpack_bits(stored["planes"], 1, 192).float().chunk(2, -1)
    a1, a2 = (a.float().repeat_interleave(32, -1) for a in params)
    decoded = a1 * b1 + a2 * b2
    assert torch.equal(decoded, grid.decode(codes, params))
    # H of the paper: 1 from zero on
    assert torch.equal(b1, (weight - (a1 + a2) / 2 >= 0).float())
    assert torch.equal(b2, (-(weight - a1 * b1 - a2 / 2) >= 0).float())
    # most weights are near zero, so most bits are zeros
    assert b1.mean() < 0.5
    assert b2.mean() < 0.5


def test_codes_are_those_of_the_nearest_levels_wherever_they_lie(generator):
    weight, grid = torch.randn(16, 96, generator=generator), DualBinary(32)
    a1 = torch.rand(16, 3, generator=generator) + 0.1
    params = DualBinaryParams(a1.half(), (-a1 * torch.rand(16, 3, generator=generator)).half())
    codes = grid.encode(weight, params)
    levels = torch.stack([grid.decode(torch.full_like(codes, code), params) for code in range(4)])
    assert (levels.diff(dim=0) >= 0).all()
    nearest = (levels - weight).abs().amin(0)
    torch.testing.assert_close((grid.decode(codes, params) - weight).abs(), nearest)


def test_bits_are_two_and_two_scales_per_group():
    assert bits_per_weight(DualBinary(64), 16, 1024) == 2.5
    assert bits_per_weight(DualBinary(128), 16, 1024) == 2.25


def test_solvers_that_round_weight_by_weight_take_it(generator):
    weight, x = torch.randn(32, 64, generator=generator), torch.randn(256, 64, generator=generator)
    x = x @ torch.randn(64, 64, generator=generator)
    hessian, grid = x.T @ x / len(x), DualBinary(32)
    nearest, clipped, gptq = (
        relative_error(weight, grid.decode(*solver.solve(weight, grid, hessian)), hessian)
        for solver in (RTN(), ClipSearch("diagonal"), GPTQ())
    )
    assert clipped < nearest
    assert gptq < nearest


def test_group_sizes_are_checked():
    with pytest.raises(ValueError, match="group_size must be positive"):
        DualBinary(0)
