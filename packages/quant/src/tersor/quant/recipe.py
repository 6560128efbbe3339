"""What a quantiser is made of: the numbers that weights become, and who chooses among them."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from tersor.quant.grid import IntGrid
from tersor.quant.solver import RTN, Result


class Solver(Protocol):
    needs_hessian: bool  # whether calibration data is needed

    def solve(self, weight: Tensor, grid: IntGrid, hessian: Tensor | None) -> Result:
        """Codes and grid parameters for `weight` (out, in), given the second moments of its inputs (in, in).

        Each row by itself: the walk stacks the weights of layers that share their inputs.
        """
        ...


@dataclass(frozen=True)
class Recipe:
    """A quantiser for `quantize`.

    Args:
        grid: which numbers a weight may become, and what they cost.
        solver: which of them it does become.
    """

    grid: IntGrid
    solver: Solver = RTN()
