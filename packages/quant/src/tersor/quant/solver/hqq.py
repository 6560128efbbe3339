"""HQQ: zero points that leave large errors large and the others small, without data."""

from dataclasses import dataclass

from torch import Tensor

from tersor.quant.grid import Grid, IntGrid, IntParams
from tersor.quant.solver.result import Result


@dataclass(frozen=True)
class HQQ:
    """Half-quadratic quantisation (Mobius Labs, 2023): minimises sum |W - Q|^p of each group over its zero point.

    The scale stays that of rounding to nearest. In turns, E = shrink(W - Q) takes up what is left as outliers, and the
    zero point becomes mean(codes - (W - E) / scale). Unlike the authors' code, errors are measured in steps of the scale,
    so that a multiple of the weights gives the same codes, and the best zero point of each group is kept, so that none
    is worse than rounding to nearest; thus there is nothing to stop early.

    Args:
        p: of the norm; below 1 it spares many small errors rather than few large ones.
        beta: shrink(x) = sign(x) max(0, |x| - |x|^(p-1) / beta).
        kappa: factor by which beta grows in each iteration.
        iterations: at most.
    """

    p: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01
    iterations: int = 20
    needs_hessian = False

    def __post_init__(self) -> None:
        if not 0 < self.p <= 1:
            raise ValueError(f"p must be in (0, 1], got {self.p}")
        if not self.beta > 0:
            raise ValueError(f"beta must be positive, got {self.beta}")
        if self.iterations < 1:
            raise ValueError(f"iterations must be positive, got {self.iterations}")

    def solve(self, weight: Tensor, grid: Grid, hessian: Tensor | None) -> Result:
        if not (isinstance(grid, IntGrid) and grid.float_zero):
            raise TypeError(
                f"HQQ moves zero points off the levels, which {grid} cannot: use IntGrid(..., float_zero=True)"
            )
        scale, zero_point = grid.fit(weight)
        W = weight.float().unflatten(-1, (scale.shape[-1], -1)) / scale[..., None].float()
        best, least, beta = zero_point, None, self.beta
        for _ in range(self.iterations + 1):
            codes = grid.encode(weight, IntParams(scale, zero_point)).view_as(W)
            error = W - (codes - zero_point[..., None].float())
            loss = error.abs().pow(self.p).sum(-1)
            best = zero_point if least is None else zero_point.where(loss < least, best)
            least = loss if least is None else loss.minimum(least)
            # |x|^(p-1) is infinite at 0, where nothing is left either way
            outliers = error.sign() * (error.abs() - error.abs().pow(self.p - 1) / beta).clamp(min=0)
            zero_point = (codes - (W - outliers)).mean(-1).half()
            beta *= self.kappa
        params = IntParams(scale, best)
        return Result(grid.encode(weight, params), params)
