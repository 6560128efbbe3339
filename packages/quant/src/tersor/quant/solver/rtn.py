"""Round to nearest."""

from dataclasses import dataclass

from torch import Tensor

from tersor.quant.grid import Grid
from tersor.quant.solver.result import Result


@dataclass(frozen=True)
class RTN:
    """Each weight becomes its nearest level; needs no data."""

    needs_hessian = False

    def solve(self, weight: Tensor, grid: Grid, hessian: Tensor | None) -> Result:
        params = grid.fit(weight)
        return Result(grid.encode(weight, params), params)
