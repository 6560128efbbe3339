"""GPTQ: column by column, later columns make up for the rounding errors of earlier ones."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tersor.quant.grid import IntGrid, IntParams
from tersor.quant.solver.result import Result


@dataclass(frozen=True)
class GPTQ:
    """Minimises tr((W - Q) H (W - Q)^T) greedily (arXiv:2210.17323, algorithm 1).

    Column j is rounded to q; its error e = (w - q) / U_jj, U the upper Cholesky factor of the inverse of H, is
    subtracted as e U_j from all later columns. With H = I this is rounding to nearest. Like the authors' code, a group's
    scale is fitted when its first column is reached, on weights that already carry the corrections.

    Args:
        damp: this share of the mean of H's diagonal is added to it; ten times more, thrice, if H is still singular.
        order: "none" goes from left to right. "act" goes by decreasing H_jj, so that inputs that matter most are
            rounded while most can still be corrected; groups are then fitted beforehand, on the original weights.
        block_size: columns whose corrections are applied to the rest at once; changes the time, not the result.
    """

    damp: float = 0.01
    order: Literal["none", "act"] = "none"
    block_size: int = 128
    needs_hessian = True

    def __post_init__(self) -> None:
        if not self.damp > 0:
            raise ValueError(f"damp must be positive, got {self.damp}")
        if self.order not in ("none", "act"):
            raise ValueError(f'order must be "none" or "act", got {self.order!r}')
        if self.block_size < 1:
            raise ValueError(f"block_size must be positive, got {self.block_size}")

    def solve(self, weight: Tensor, grid: IntGrid, hessian: Tensor | None) -> Result:
        """Raises ValueError where H is not positive definite even after damping."""
        if hessian is None:
            raise ValueError("GPTQ needs calibration data")
        H, W = hessian.double(), weight.float().clone()
        dead = H.diagonal() == 0  # inputs that were always zero: their weights do not matter
        H = H + torch.diag(dead.double())
        W[:, dead] = 0
        order = (
            H.diagonal().argsort(descending=True, stable=True)
            if self.order == "act"
            else torch.arange(len(H), device=H.device)
        )
        U = self._inverse_factor(H[order][:, order]).float()
        codes, params = self._columns(W[:, order], grid, U, order)
        return Result(codes[:, order.argsort()], params)

    def _inverse_factor(self, H: Tensor) -> Tensor:
        """Upper Cholesky factor of the inverse of H, damped until there is one."""
        damping = self.damp * H.diagonal().mean()
        eye = torch.eye(len(H), dtype=H.dtype, device=H.device)
        for _ in range(4):
            lower, failed = torch.linalg.cholesky_ex(H + damping * eye)
            if not failed:
                inverse = torch.cholesky_inverse(lower)
                upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
                if not failed:
                    return upper
            damping = 10 * damping
        raise ValueError(
            "the inputs' second moments are not positive definite; use more calibration data or a larger damp"
        )

    def _columns(self, W: Tensor, grid: IntGrid, U: Tensor, order: Tensor) -> tuple[Tensor, IntParams]:
        """Codes of the columns of W, which stand in `order`, and the parameters of the groups, which do not."""
        width = grid.group_size or W.shape[1]
        groups = order // width
        params = grid.fit(W[:, order.argsort()])
        codes = torch.empty_like(W, dtype=torch.uint8)
        for start in range(0, W.shape[1], self.block_size):
            end = min(start + self.block_size, W.shape[1])
            errors = W.new_empty(len(W), end - start)
            for j in range(start, end):
                group = int(groups[j])
                if self.order == "none" and j % width == 0:
                    # the columns right of this block lack only corrections of this very block: apply them now
                    ahead = W[:, j : j + width].clone()
                    ahead[:, max(0, end - j) :] -= errors[:, : j - start] @ U[start:j, max(end, j) : j + width]
                    fitted = grid.fit_group(ahead)
                    params.scale[:, group], params.zero_point[:, group] = fitted.scale[:, 0], fitted.zero_point[:, 0]
                mine = IntParams(params.scale[:, group, None], params.zero_point[:, group, None])
                codes[:, j : j + 1] = grid.encode(W[:, j : j + 1], mine)
                error = (W[:, j : j + 1] - grid.decode(codes[:, j : j + 1], mine)) / U[j, j]
                W[:, j + 1 : end] -= error @ U[j : j + 1, j + 1 : end]
                errors[:, j - start : j - start + 1] = error
            W[:, end:] -= errors @ U[start:end, end:]
        return codes, params
