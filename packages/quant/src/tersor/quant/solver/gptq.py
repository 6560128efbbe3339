"""GPTQ: column by column, later columns make up for the rounding errors of earlier ones."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from tersor.quant.grid import Grid, ScalarGrid, of_groups
from tersor.quant.grid.protocol import Params
from tersor.quant.solver.clip import ClipSearch
from tersor.quant.solver.protocol import weight_by_weight
from tersor.quant.solver.result import Result


class Swept(NamedTuple):
    codes: Tensor  # (out, in)
    params: Params
    weight: Tensor  # (out, in): what each weight was when it was rounded, the corrections so far included


@dataclass(frozen=True)
class GPTQ:
    """Minimises tr((W - Q) H (W - Q)^T) greedily (arXiv:2210.17323, algorithm 1).

    Column j is rounded to q; its error e = (w - q) / U_jj, U the upper Cholesky factor of the inverse of H, is
    subtracted as e U_j from all later columns. What is minimised ends up as the sum of all e^2. With H = I this is
    rounding to nearest. Unlike the authors' code, the weights of inputs that were always zero in the calibration data
    are rounded to nearest, not set to zero: other data may use them.

    Args:
        damp: this share of the mean of H's diagonal is added to it; ten times more, thrice, if H is still singular.
        order: of the columns. "act": by decreasing H_jj, so that the inputs that matter most are rounded while most can
            still be corrected; groups are fitted beforehand, on the original weights. "none": as they stand; a group is
            fitted when its first column is reached, on weights that carry the corrections so far. "group": the groups
            by their largest H_jj and the columns of each by H_jj, fitted as in "none".
        block_size: columns whose corrections are applied to the rest at once; changes the time, not the result.
        clip: shrinks the range of each group after it was fitted; None: it stays that of the weights.
    """

    damp: float = 0.01
    # KL divergence of Gemma-3-270M at 4 bits in groups of 64: act .066, group .074, none .091 (rounding to nearest .321)
    order: Literal["act", "none", "group"] = "act"
    block_size: int = 128
    clip: ClipSearch | None = None
    needs_hessian = True

    def __post_init__(self) -> None:
        if not self.damp > 0:
            raise ValueError(f"damp must be positive, got {self.damp}")
        if self.order not in ("act", "none", "group"):
            raise ValueError(f'order must be "act", "none" or "group", got {self.order!r}')
        if self.block_size < 1:
            raise ValueError(f"block_size must be positive, got {self.block_size}")

    def solve(self, weight: Tensor, grid: Grid, hessian: Tensor | None) -> Result:
        """Codes and grid parameters for `weight` (out, in); `hessian` (in, in) are the second moments of its inputs.

        Raises:
            ValueError: H is not positive definite even after damping, or not finite.
        """
        columnwise = weight_by_weight(grid, "GPTQ")
        order, U = self.factor(weight, columnwise, hessian)

        def clipped(weight: Tensor, grid: ScalarGrid, params: Params, inputs: Tensor) -> Params:
            if self.clip is None or hessian is None:
                return params
            return self.clip.shrink(weight, grid, params, hessian[inputs][:, inputs])

        swept = self.sweep(weight, columnwise, order, U, clipped, lambda errors: errors)
        return Result(swept.codes, swept.params)

    def factor(self, weight: Tensor, grid: ScalarGrid, hessian: Tensor | None) -> tuple[Tensor, Tensor]:
        """The inputs in the order in which their columns are rounded, and U in that order; errors as of `solve`."""
        if hessian is None:
            raise ValueError("GPTQ needs calibration data")
        order = self._order(hessian.diagonal(), grid)
        return order, self._inverse_factor(hessian[order][:, order].double(), weight.dtype)

    def sweep(
        self,
        weight: Tensor,
        grid: ScalarGrid,
        order: Tensor,
        U: Tensor,
        refine: Callable[[Tensor, ScalarGrid, Params, Tensor], Params],
        pass_on: Callable[[Tensor], Tensor],
    ) -> Swept:
        """One pass over the columns, with what `factor` gave.

        Args:
            refine: (weight, grid, params, inputs) -> params: what becomes of parameters fitted to the weights of `inputs`.
            pass_on: of a column's errors e (out,), those that later columns make up for.
        """
        params, columns = grid.fit(weight), grid.whole()
        if self.order == "act":
            params = refine(weight, grid, params, torch.arange(len(order), device=order.device))
        width = weight.shape[1] // grid.groups(weight.shape[1])
        groups, diagonal = (order // width).tolist(), U.diagonal().tolist()
        of_group = [of_groups(params, slice(group, group + 1)) for group in range(weight.shape[1] // width)]  # views
        if self.order == "act":
            # they stay: converted once, not for each column
            of_group = [type(params)(*(p.float() if p.is_floating_point() else p for p in mine)) for mine in of_group]
        W = weight.T[order]  # (in, out): its rows are the columns of the formula
        codes = torch.empty_like(W, dtype=torch.uint8)
        for start in range(0, len(W), self.block_size):
            end = min(start + self.block_size, len(W))
            errors = torch.empty_like(W[start:end])
            for j in range(start, end):
                mine = of_group[groups[j]]
                if self.order != "act" and j % width == 0:
                    ahead = W[j : j + width].clone()
                    # beyond this block, the corrections of this block are still missing
                    ahead[end - j :] -= U[start:j, end : j + width].T @ errors[: j - start]
                    ahead = ahead.T.contiguous()
                    refined = refine(ahead, columns, columns.refit(ahead, mine), order[j : j + width])
                    for one, stored in zip(refined, mine):
                        stored.copy_(one)
                code = columns.encode(W[j, :, None], mine)
                codes[j] = code[:, 0]
                errors[j - start] = pass_on((W[j] - columns.decode(code, mine)[:, 0]) / diagonal[j])
                W[j + 1 : end].addr_(U[j, j + 1 : end], errors[j - start], alpha=-1)
            W[end:].addmm_(U[start:end, end:].T, errors, alpha=-1)
        back = order.argsort()
        return Swept(codes[back].T.contiguous(), params, W[back].T)

    def _order(self, importance: Tensor, grid: ScalarGrid) -> Tensor:
        """Positions of the columns in the order in which they are rounded."""
        if self.order == "none":
            return torch.arange(len(importance), device=importance.device)
        if self.order == "act":
            return importance.argsort(descending=True, stable=True)
        of_group = importance.unflatten(0, (grid.groups(len(importance)), -1))
        inside = of_group.argsort(descending=True, stable=True)
        starts = torch.arange(0, len(importance), of_group.shape[1], device=importance.device)
        return (starts[:, None] + inside)[of_group.amax(1).argsort(descending=True, stable=True)].flatten()

    def _inverse_factor(self, H: Tensor, dtype: torch.dtype) -> Tensor:
        """U, upper triangular, with U^T U = H^-1; H is damped until there is one."""
        mean = H.diagonal().mean()
        # inputs that were never anything but zero leave nothing to correct
        damping = self.damp * mean if mean else mean + 1
        for _ in range(4):
            # rows and columns reversed: with L L^T = H there, U is the inverse of L reversed
            lower = H.flip(0, 1)
            lower.diagonal().add_(damping)
            lower, failed = torch.linalg.cholesky_ex(lower)
            # a row that is not finite makes its last element so
            if not failed and lower.diagonal().isfinite().all():
                # whether there is a factor takes float64; inverting it does not
                eye = torch.eye(len(H), dtype=dtype, device=H.device)
                return torch.linalg.solve_triangular(lower.to(dtype), eye, upper=False).flip(0, 1)
            damping = 10 * damping
        raise ValueError(
            "the second moments of the inputs are not positive definite; use more calibration data or a larger damp"
        )
