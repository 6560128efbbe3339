"""Coordinate descent: each weight on the best level, given all others."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tersor.quant.grid import Grid, of_groups
from tersor.quant.solver.gptq import GPTQ
from tersor.quant.solver.protocol import Solver, weight_by_weight
from tersor.quant.solver.result import Result, Split


@dataclass(frozen=True)
class CoordinateDescent:
    """Lowers tr((W - Q) H (W - Q)^T) from where another solver left it; no step raises it (QuantEase, arXiv:2309.01885).

    In turns, column j moves to the levels nearest to q_j + G_j / H_jj, G = (W - Q) H: the exact minimum over the levels,
    as the objective is a parabola in each weight. The grid's parameters stay. Inputs that were always zero stay as they are.

    Args:
        start: the solver that comes before.
        sweeps: over all columns; ends earlier when nothing moves.
        block_size: columns whose steps reach the rest of G at once; changes the time, not the result.
    """

    start: Solver = GPTQ()
    sweeps: int = 3
    block_size: int = 128
    needs_hessian = True

    def __post_init__(self) -> None:
        if self.sweeps < 1:
            raise ValueError(f"sweeps must be positive, got {self.sweeps}")
        if self.block_size < 1:
            raise ValueError(f"block_size must be positive, got {self.block_size}")

    def solve(self, weight: Tensor, grid: Grid, hessian: Tensor | None) -> Result | Split:
        if hessian is None:
            raise ValueError("CoordinateDescent needs calibration data")
        scalar = weight_by_weight(grid, "CoordinateDescent")
        found = self.start.solve(weight, grid, hessian)
        codes, params = found.codes, found.params
        if isinstance(found, Split):
            weight = weight - found.rest
        columns, width = scalar.whole(), weight.shape[1] // scalar.groups(weight.shape[1])
        # (in, out): rows are the columns of the formula
        Q = grid.decode(codes, params).to(weight.dtype).T.contiguous()
        H, codes, diagonal = hessian.to(weight.dtype), codes.T.contiguous(), hessian.diagonal().tolist()
        G = H @ (weight.T - Q)
        for _ in range(self.sweeps):
            before = codes.clone()
            for start in range(0, len(Q), self.block_size):
                block = slice(start, min(start + self.block_size, len(Q)))
                came_from = Q[block].clone()
                for j in range(start, block.stop):
                    if not diagonal[j]:
                        continue
                    best = Q[j] + G[j] / diagonal[j]
                    mine = of_groups(params, slice(j // width, j // width + 1))
                    code = columns.encode(best[:, None], mine)
                    level = columns.decode(code, mine)[:, 0]
                    # of two levels at the same distance the old one stays
                    moves = (level - best).abs() < (Q[j] - best).abs()
                    step = torch.where(moves, level - Q[j], 0)
                    codes[j] = code[:, 0].where(moves, codes[j])
                    Q[j] = level.where(moves, Q[j])
                    G[block].addr_(H[block, j], step, alpha=-1)
                moved = Q[block] - came_from
                G[:start] -= H[:start, block] @ moved
                G[block.stop :] -= H[block.stop :, block] @ moved
            if torch.equal(codes, before):
                break
        return found._replace(codes=codes.T.contiguous())
