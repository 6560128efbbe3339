"""DGQ's search: the steps of groups first, then the scales of rows."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tersor.quant.grid import DualGrain, DualGrainParams, Grid, IntGrid
from tersor.quant.solver.result import Result


@dataclass(frozen=True)
class DualGrainSearch:
    """Rounds to nearest on the steps and scales of a `DualGrain` that lose least (arXiv:2310.04836, section 3.2).

    Fine: each group's range is shrunk to r (min w, max w) with the r, of 1.009, .998, ..., .8, that loses least of the
    group's own outputs, tr(E_g H_gg E_g^T), with real scales. Coarse: the row's scale is r max|w| / 127 with the r, of
    1.00975, .9995, ..., .2, that loses least of all outputs, tr(E H E^T), once the steps are rounded to multiples of it.

    The authors' code shrinks the weights that it has already clipped again for each r, so its first search sees ever less of
    them; here each r starts from the original.

    Args:
        fine, coarse: how many ratios are tried; more than the authors' 20 and 80 go on downwards.
    """

    fine: int = 20
    coarse: int = 80
    needs_hessian = True

    def __post_init__(self) -> None:
        # the ratio would fall to 0.03 and 0.05
        if not (1 <= self.fine <= 90 and 1 <= self.coarse <= 95):
            raise ValueError(f"fine must be 1 to 90 and coarse 1 to 95, got {self.fine} and {self.coarse}")

    def solve(self, weight: Tensor, grid: Grid, hessian: Tensor | None) -> Result:
        if not isinstance(grid, DualGrain):
            raise TypeError(f"DualGrainSearch needs scales of two levels, which {grid} does not have: use a DualGrain")
        if hessian is None:
            raise ValueError("DualGrainSearch needs calibration data")
        H = hessian.to(weight.dtype)
        params = self._coarse(weight, grid, H, *self._fine(weight, grid, H))
        return Result(grid.encode(weight, params), params)

    def _fine(self, weight: Tensor, grid: DualGrain, H: Tensor) -> tuple[Tensor, Tensor]:
        """The range of each group, (out, groups)."""
        low, high = grid.extremes(weight)
        groups = low.shape[1]
        # (groups, size, size): the blocks on the diagonal
        of_group = H.unflatten(0, (groups, -1)).unflatten(2, (groups, -1)).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        real = IntGrid(4, grid.group_size)
        best, least = torch.ones_like(low), torch.full_like(low, torch.inf)
        for i in range(self.fine):
            ratio = 1.02 - 0.011 * (i + 1)
            params = real.spanning(ratio * low, ratio * high)
            error = (
                (weight - real.decode(real.encode(weight, params), params)).unflatten(-1, (groups, -1)).transpose(0, 1)
            )
            loss = ((error @ of_group) * error).sum(-1).T
            best, least = torch.where(loss < least, ratio, best), torch.minimum(loss, least)
        return best * low, best * high

    def _coarse(self, weight: Tensor, grid: DualGrain, H: Tensor, low: Tensor, high: Tensor) -> DualGrainParams:
        largest = weight.float().abs().amax(-1, keepdim=True)
        best: DualGrainParams | None = None
        least = torch.full_like(largest, torch.inf)
        for i in range(self.coarse):
            params = grid.spanning(low, high, (1.02 - 0.01025 * (i + 1)) * largest / 127)
            error = weight - grid.decode(grid.encode(weight, params), params)
            loss = ((error @ H) * error).sum(-1, keepdim=True)
            better = loss < least
            best = params if best is None else DualGrainParams(*(p.where(better, b) for p, b in zip(params, best)))
            least = torch.minimum(loss, least)
        assert best is not None
        return best
