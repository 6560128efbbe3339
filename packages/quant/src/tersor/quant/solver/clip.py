"""Clip search: a range smaller than the weights', where that loses less."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tersor.quant.grid import BilevelInt, Grid, ScalarGrid, of_groups
from tersor.quant.grid.protocol import Params
from tersor.quant.solver.protocol import weight_by_weight
from tersor.quant.solver.result import Result


@dataclass(frozen=True)
class ClipSearch:
    """Rounds to nearest on the range, of each group of each row, that loses least: never more than rounding by itself.

    A range is shrunk by fitting the grid to ratio * W; so it works on every grid whose levels follow the weights of a row.

    Args:
        metric: what is lost, with E = W - Q. "weight": sum |E|^2.4, without data, as GPTQ's authors' code has it;
            "diagonal": sum_j H_jj E_j^2; "outputs": tr(E H E^T), the groups one after the other, given those before.
        smallest: ratio tried, of 1 ... smallest.
        steps: how many ratios besides 1.
    """

    metric: Literal["weight", "diagonal", "outputs"] = "weight"
    smallest: float = 0.2
    steps: int = 80

    def __post_init__(self) -> None:
        if self.metric not in ("weight", "diagonal", "outputs"):
            raise ValueError(f'metric must be "weight", "diagonal" or "outputs", got {self.metric!r}')
        if not 0 < self.smallest < 1:
            raise ValueError(f"smallest must be between 0 and 1, got {self.smallest}")
        if self.steps < 1:
            raise ValueError(f"steps must be positive, got {self.steps}")

    @property
    def needs_hessian(self) -> bool:
        return self.metric != "weight"

    def solve(self, weight: Tensor, grid: Grid, hessian: Tensor | None) -> Result:
        params = self.shrink(weight, weight_by_weight(grid, "ClipSearch"), grid.fit(weight), hessian)
        return Result(grid.encode(weight, params), params)

    def shrink(self, weight: Tensor, grid: ScalarGrid, params: Params, hessian: Tensor | None) -> Params:
        """The parameters that lose least of `weight` (out, in), of those that `grid` fitted to it and shrunk ones.

        Raises:
            TypeError: a row's range cannot be chosen by itself.
        """
        if hessian is None and self.needs_hessian:
            raise ValueError(f'ClipSearch("{self.metric}") needs calibration data')
        if isinstance(grid, BilevelInt):
            raise TypeError("ClipSearch chooses row by row, but BilevelInt fits several rows at once; use an IntGrid")
        if all(len(p) != len(weight) for p in params):
            raise TypeError(f"ClipSearch chooses row by row, but rows share the ranges of {grid}; use RTN()")
        H = hessian.to(weight.dtype) if hessian is not None else None
        columns, chosen = grid.whole(), type(params)(*(p.clone() for p in params))
        error = weight - grid.decode(grid.encode(weight, params), params)
        width = weight.shape[1] // grid.groups(weight.shape[1])
        for group in range(weight.shape[1] // width):
            here, inputs = slice(group, group + 1), slice(group * width, (group + 1) * width)
            W, fitted, best = weight[:, inputs].contiguous(), of_groups(params, here), error[:, inputs]
            # what the errors of the other groups add to those of this one
            others = (
                error @ H[:, inputs] - best @ H[inputs, inputs] if H is not None and self.metric == "outputs" else None
            )
            least, found = self._loss(best, H, inputs, others), fitted
            for ratio in torch.linspace(1, self.smallest, self.steps + 1)[1:].tolist():
                tried = columns.refit(ratio * W, fitted)
                error_tried = W - columns.decode(columns.encode(W, tried), tried)
                loss = self._loss(error_tried, H, inputs, others)
                better = loss < least
                least, best = torch.minimum(loss, least), error_tried.where(better[:, None], best)
                # what all rows share is the same in both
                found = type(params)(*(f if len(f) != len(W) else _pick(better, t, f) for t, f in zip(tried, found)))
            error[:, inputs] = best
            for one, of_all in zip(found, chosen):
                of_all[:, here] = one  # nothing, of what all groups share
        return chosen

    def _loss(self, error: Tensor, H: Tensor | None, inputs: slice, others: Tensor | None) -> Tensor:
        """Of each row, for the group's errors (out, group)."""
        if H is None or self.metric == "weight":
            return error.abs().pow(2.4).sum(-1)
        if others is None:
            return error.square() @ H.diagonal()[inputs]
        return ((error @ H[inputs, inputs] + 2 * others) * error).sum(-1)


def _pick(rows: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """`one` in these rows, elsewhere `other`."""
    return one.where(rows.view(-1, *(1 for _ in one.shape[1:])), other)
