"""HQQ: sparse large errors in place of many middling ones."""

import pytest
import torch

from tersor.quant.grid import IntGrid, NormalFloatGrid
from tersor.quant.solver import HQQ, RTN


def errors(solver, weight, grid):
    """(out, groups, group_size), in steps of the scale."""
    codes, params = solver.solve(weight, grid, None)
    error = (weight - grid.decode(codes, params)).unflatten(-1, (-1, grid.group_size))
    return error / params.scale[..., None].float()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_no_group_loses_more_than_by_rounding_to_nearest(bits, generator):
    weight, grid = torch.randn(32, 256, generator=generator), IntGrid(bits, 64, float_zero=True)
    ours, nearest = (errors(solver, weight, grid).abs().pow(0.7).sum(-1) for solver in (HQQ(), RTN()))
    assert (ours <= nearest * (1 + 1e-5)).all()  # steps are computed in two ways
    assert ours.sum() < nearest.sum()


def test_beside_outliers_the_other_weights_lose_less(generator):
    weight, grid = torch.randn(64, 256, generator=generator), IntGrid(4, 64, float_zero=True)
    weight[:, ::64] *= 10
    inliers = [errors(solver, weight, grid)[..., 1:].abs().mean() for solver in (HQQ(), RTN())]
    assert inliers[0] < inliers[1]


def test_a_multiple_of_the_weights_has_the_same_codes(generator):
    weight, grid = torch.randn(8, 128, generator=generator), IntGrid(3, 32, float_zero=True)
    once, more = HQQ().solve(weight, grid, None), HQQ().solve(weight / 64, grid, None)
    assert torch.equal(once.codes, more.codes)
    assert torch.equal(once.params.zero_point, more.params.zero_point)


@pytest.mark.parametrize("width", [0.0, 1e-6, 1e-5, 1e-3, 1e-2], ids=str)
def test_groups_far_from_zero_are_missed_by_no_more_than_they_are_wide(width, generator):
    """A zero point of float16 is rounded to eleven bits; further off it would be infinite."""
    weight, grid = 1 + width * torch.rand(8, 64, generator=generator), IntGrid(4, 32, float_zero=True)
    for solver in (RTN(), HQQ()):
        error = (grid.decode(*solver.solve(weight, grid, None)) - weight).abs()
        # half a step where that rounding is less; 1e-3: that of the scale, of what is spanned from zero
        half_a_step = width / 30
        assert (error <= (2.1 * half_a_step if width == 1e-2 else width + 1e-3)).all()


def test_only_integers_with_a_zero_point_anywhere_will_do():
    for grid in (IntGrid(4, 64), NormalFloatGrid(64)):
        with pytest.raises(TypeError, match="float_zero=True"):
            HQQ().solve(torch.randn(2, 64), grid, None)


@pytest.mark.parametrize("setting", [{"p": 0.0}, {"p": 1.5}, {"beta": 0.0}, {"iterations": 0}], ids=str)
def test_settings_are_checked(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        HQQ(**setting)
