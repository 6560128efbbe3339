"""CoordinateDescent: downhill only, until no single weight can do better. LearnedRounding likewise, by gradients."""

from itertools import pairwise

import pytest
import torch

from tersor.quant.grid import GaussianPairGrid, IntGrid, NormalFloatGrid, NVFP4Grid
from tersor.quant.solver import GPTQ, RTN, ClipSearch, CoordinateDescent, LearnedRounding

GRIDS = [IntGrid(2, 16), IntGrid(4, None, symmetric=True), NormalFloatGrid(16), NVFP4Grid()]
STARTS = [RTN(), GPTQ(), GPTQ(order="group"), ClipSearch(steps=10)]


@pytest.fixture
def layer(generator):
    x = torch.randn(256, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    return torch.randn(16, 64, generator=generator), (x.T @ x).double() / len(x)


def objective(weight, result, grid, H):
    """Of each row."""
    error = (weight - grid.decode(*result)).double()
    return (error @ H * error).sum(-1)


@pytest.mark.parametrize("start", STARTS, ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_no_sweep_raises_the_error_of_a_row(grid, start, layer):
    weight, H = layer
    errors = [objective(weight, start.solve(weight, grid, H), grid, H)]
    errors += [objective(weight, CoordinateDescent(start, n).solve(weight, grid, H), grid, H) for n in (1, 2, 4)]
    for before, after in pairwise(errors):
        assert (after <= before * (1 + 1e-5)).all()  # sums in float32
    assert errors[-1].sum() < 0.99 * errors[0].sum()


@pytest.mark.parametrize("grid", GRIDS[:1], ids=str)
def test_at_the_end_no_single_code_can_do_better(grid, layer):
    weight, H = layer
    weight = weight[:3].double()
    codes, params = CoordinateDescent(RTN(), sweeps=100).solve(weight, grid, H)
    least = objective(weight, (codes, params), grid, H)
    for column in range(64):
        for code in range(2**grid.bits):
            other = codes.clone()
            other[:, column] = code
            assert (objective(weight, (other, params), grid, H) >= least * (1 - 1e-9)).all()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_block_size_does_not_change_the_result(grid, layer):
    weight, H = layer[0].double(), layer[1]
    results = [CoordinateDescent(block_size=size).solve(weight, grid, H) for size in (1, 7, 64, 128)]
    assert all(torch.equal(result.codes, results[0].codes) for result in results)


@pytest.mark.parametrize("scale_rate", [0.0, 1e-3])
@pytest.mark.parametrize("start", [RTN(), GPTQ(), CoordinateDescent()], ids=str)
def test_learned_rounding_is_never_worse_than_its_start(start, scale_rate, layer):
    weight, H = layer
    for grid in (IntGrid(2, 16), IntGrid(3, None, symmetric=True, restricted=True), IntGrid(3, 16, float_zero=True)):
        before = objective(weight, start.solve(weight, grid, H), grid, H)
        learned = LearnedRounding(start, steps=60, scale_rate=scale_rate).solve(weight, grid, H)
        after = objective(weight, learned, grid, H)
        assert (after <= before * (1 + 1e-5)).all()
        assert int(learned.codes.min()) >= int(grid.restricted)
        assert int(learned.codes.max()) < 2**grid.bits


def test_learned_rounding_takes_a_third_of_the_error_of_rounding_to_nearest(layer):
    weight, H = layer
    grid = IntGrid(4, 16)
    before = objective(weight, RTN().solve(weight, grid, H), grid, H).sum()
    assert objective(weight, LearnedRounding().solve(weight, grid, H), grid, H).sum() < 2 / 3 * before


def test_they_say_which_grids_they_do_not_take(layer):
    weight, H = layer
    with pytest.raises(TypeError, match="CoordinateDescent rounds weight by weight, which GaussianPairGrid"):
        CoordinateDescent(RTN()).solve(weight, GaussianPairGrid(), H)
    with pytest.raises(TypeError, match="GPTQ rounds weight by weight, which GaussianPairGrid"):
        GPTQ().solve(weight, GaussianPairGrid(), H)
    with pytest.raises(TypeError, match="LearnedRounding needs evenly spaced levels"):
        LearnedRounding().solve(weight, NormalFloatGrid(16), H)


@pytest.mark.parametrize("setting", [{"sweeps": 0}, {"block_size": 0}], ids=str)
def test_settings_are_checked(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        CoordinateDescent(**setting)


@pytest.mark.parametrize("setting", [{"steps": 0}, {"rate": 0.0}, {"scale_rate": -1.0}], ids=str)
def test_settings_of_learned_rounding_are_checked(setting):
    with pytest.raises(ValueError, match=r"steps|rates"):
        LearnedRounding(**setting)
