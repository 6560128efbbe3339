"""SpQR: GPTQ that leaves out the few weights that it could not round without harm."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tersor.quant.grid import Grid, ScalarGrid
from tersor.quant.grid.protocol import Params
from tersor.quant.solver.gptq import GPTQ
from tersor.quant.solver.protocol import weight_by_weight
from tersor.quant.solver.result import Split


@dataclass(frozen=True)
class SpQR:
    """GPTQ whose outliers keep their values, beside the grid, in a `SparseOutliers` (arXiv:2306.03078, algorithm 1).

    A weight is an outlier if its e^2 = ((w - q) / U_jj)^2 exceeds T = tau mean_j(var_i(w_ij) / U_jj^2); later columns then
    have nothing to make up for. A group's grid is fitted without its likely outliers: those without which the others'
    error would fall by more than T. T is that of the whole weight: rows of several layers, solved as one, share it.

    Unlike the authors' code, inputs stay in their groups, so that no permutation has to be stored, and damping is GPTQ's
    usual .01, not 1: on tiny-lm that loses a third less at the same number of outliers. Weights without heavy tails gain
    from the small groups, not from the outliers: there GPTQ spends 4 bits better in large groups of 4-bit codes.

    Args:
        tau: infinity: GPTQ; 0: whatever is not on a level is an outlier.
        gptq: its damping and order of columns, "group" or "none": the test needs a group's weights as they are rounded.
    """

    tau: float = 0.2
    gptq: GPTQ = GPTQ(order="group")
    needs_hessian = True

    def __post_init__(self) -> None:
        if not self.tau >= 0:
            raise ValueError(f"tau must not be negative, got {self.tau}")
        if self.gptq.order == "act" or self.gptq.clip:
            raise ValueError(f'gptq must have order "group" or "none" and no clip, got {self.gptq}')

    def solve(self, weight: Tensor, grid: Grid, hessian: Tensor | None) -> Split:
        """As `GPTQ.solve`; `rest` is what outliers have beyond their levels."""
        columnwise = weight_by_weight(grid, "SpQR")
        order, U = self.gptq.factor(weight, columnwise, hessian)
        step = U.diagonal()[order.argsort()]
        threshold = self.tau * (weight.var(0) / step.square()).mean()
        if self.tau and not threshold > 0:
            # rows that are all alike, or one row: no weight lies outside of what there is
            threshold = torch.full_like(threshold, torch.inf)

        def without_outliers(weight: Tensor, grid: ScalarGrid, params: Params, inputs: Tensor) -> Params:
            squares = ((weight - grid.decode(grid.encode(weight, params), params)) / step[inputs]).square()
            likely = torch.zeros_like(weight, dtype=torch.bool)
            for k in range(weight.shape[1]):
                others = [i for i in range(weight.shape[1]) if i != k]
                left = weight[:, others]
                refit = grid.refit(left, params)
                missed = (left - grid.decode(grid.encode(left, refit), refit)) / step[inputs[others]]
                likely[:, k] = (squares[:, others] - missed.square()).sum(-1) > threshold
            kept = ~likely
            mean = (weight * kept).sum(-1, keepdim=True) / kept.sum(-1, keepdim=True).clamp(min=1)
            return grid.refit(weight.where(kept, mean), params)

        codes, params, rounded = self.gptq.sweep(
            weight,
            columnwise,
            order,
            U,
            without_outliers,
            lambda errors: errors.masked_fill(errors.square() > threshold, 0),
        )
        rest = rounded - grid.decode(codes, params)
        return Split(codes, params, rest.where((rest / step).square() > threshold, 0))
