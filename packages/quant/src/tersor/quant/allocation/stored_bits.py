"""Costs counted from what grids lay out."""

from dataclasses import dataclass

from tersor.quant.allocation.candidates import Candidates
from tersor.quant.allocation.protocol import Table
from tersor.quant.grid import bits_per_weight


@dataclass(frozen=True)
class StoredBits:
    """Bits stored: codes, scales, zero points and all else that the grid lays out. Budgets are averages per weight."""

    unit = "bits per weight"

    def costs(self, candidates: Candidates) -> Table:
        return {
            # whole bytes, divided and multiplied by the same number: rounding gives them back
            name: [
                round(bits_per_weight(grid, *linear.weight.shape) * linear.weight.numel()) for grid in candidates.grids
            ]
            for name, linear in candidates.linears.items()
        }

    def scale(self, candidates: Candidates) -> float:
        return sum(linear.weight.numel() for linear in candidates.linears.values())
