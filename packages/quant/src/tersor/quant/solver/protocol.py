"""What the walk asks of a solver."""

from typing import Protocol

from torch import Tensor

from tersor.quant.grid import Grid, ScalarGrid
from tersor.quant.solver.result import Result, Split


class Solver(Protocol):
    @property
    def needs_hessian(self) -> bool:
        """Whether calibration data is needed."""
        ...

    def solve(self, weight: Tensor, grid: Grid, hessian: Tensor | None) -> Result | Split:
        """Codes and grid parameters for `weight` (out, in), given the second moments of its inputs (in, in).

        Each row by itself, if the grid does so: the walk stacks the weights of layers that share their inputs.

        Raises:
            TypeError: the solver does not work on this kind of grid.
        """
        ...


def weight_by_weight(grid: Grid, solver: str) -> ScalarGrid:
    """`grid`, for solvers that round one weight after the other.

    Raises:
        TypeError: one of its codes stands for several weights.
    """
    if not isinstance(grid, ScalarGrid):
        raise TypeError(f"{solver} rounds weight by weight, which {type(grid).__name__} does not; use RTN()")
    return grid
