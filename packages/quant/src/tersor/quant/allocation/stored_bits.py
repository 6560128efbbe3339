"""Costs counted from what grids lay out."""

import math
from dataclasses import dataclass

from torch import nn

from tersor.quant.allocation.candidates import Candidates
from tersor.quant.allocation.protocol import Table
from tersor.quant.grid import Grid, bits_per_weight


@dataclass(frozen=True)
class StoredBits:
    """Bits stored: codes, scales, zero points and all else that the grid lays out. Budgets are averages per weight."""

    unit = "bits per weight"

    def costs(self, candidates: Candidates) -> Table:
        grids = candidates.grids
        return {
            name: [_bits(grid, linear, candidates.padding(linear, grid)) for grid in grids]
            for name, linear in candidates.linears.items()
        }

    def scale(self, candidates: Candidates) -> float:
        return sum(linear.weight.numel() for linear in candidates.linears.values())


def _bits(grid: Grid, linear: nn.Linear, padding: int) -> int:
    shape = linear.out_features, linear.in_features + padding
    # whole bytes, divided and multiplied by the same number: rounding gives them back
    return round(bits_per_weight(grid, *shape) * math.prod(shape))
