"""WeightedRTN: grids that are fitted to what large inputs meet."""

import pytest
import torch

from tersor.quant.grid import IntGrid, KMeansGrid, SignLowRankStack
from tersor.quant.solver import RTN, WeightedRTN, relative_error

GRIDS = [KMeansGrid(2, per_tensor=True), KMeansGrid(2), SignLowRankStack(2, 4)]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_outputs_lose_less_where_inputs_differ(grid, generator):
    weight = torch.randn(32, 96, generator=generator)
    H = torch.diag(torch.exp(3 * torch.randn(96, generator=generator)))
    weighted, plain = (
        relative_error(weight, grid.decode(*solver.solve(weight, grid, H)), H) for solver in (WeightedRTN(), RTN())
    )
    assert weighted < plain


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_equal_inputs_change_nothing(grid, generator):
    weight = torch.randn(32, 96, generator=generator)
    weighted, plain = (
        relative_error(weight, grid.decode(*solver.solve(weight, grid, torch.eye(96))), None)
        for solver in (WeightedRTN(), RTN())
    )
    # sums of scaled numbers are rounded otherwise
    assert weighted == pytest.approx(plain, rel=1e-3)


def test_grids_that_weigh_nothing_are_refused(generator):
    weight = torch.randn(8, 32, generator=generator)
    with pytest.raises(TypeError, match="WeightedRTN needs a grid that can weigh columns, not IntGrid; use RTN"):
        WeightedRTN().solve(weight, IntGrid(4, 16), torch.eye(32))
    with pytest.raises(ValueError, match="WeightedRTN needs calibration data"):
        WeightedRTN().solve(weight, SignLowRankStack(1, 4), None)
