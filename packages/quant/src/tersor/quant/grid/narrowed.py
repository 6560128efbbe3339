"""An integer grid as a solver sees it whose ranges were chosen beforehand."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tersor.quant.grid.integer import IntGrid


@dataclass(frozen=True, eq=False)
class NarrowedIntGrid(IntGrid):
    """Fits itself to a share of the weights' range. What it fits belongs to the plain grid, and is stored as such.

    Args:
        share: (out, 1), of each row's groups, above 0 and at most 1.
    """

    share: Tensor = torch.ones(1, 1)

    def extremes(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        low, high = super().extremes(weight)
        return self.share * low, self.share * high
