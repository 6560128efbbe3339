"""Learned rounding: gradient descent on the layer's output error, through the rounding."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tersor.quant.grid import Grid, IntGrid, IntParams
from tersor.quant.solver.protocol import Solver
from tersor.quant.solver.result import Result, Split
from tersor.quant.solver.rtn import RTN


@dataclass(frozen=True)
class LearnedRounding:
    """Lowers tr((W - Q) H (W - Q)^T) from where another solver left it, by Adam on weights V that are rounded to Q.

    V counts in steps of the scale; its gradient is that of Q = round(V) * scale (straight through), so weights may move by
    more than one level, as in AdaQuant (arXiv:2006.10518, section 3.1) and unlike AdaRound (arXiv:2004.10568). V starts as
    near to W as the codes of `start` allow. What is returned is the best of all steps, row by row: never worse than
    `start`. The objective needs no inputs but their second moments, so a step costs one product with H. From rounding to
    nearest this ends where `CoordinateDescent` does, or a little lower; GPTQ, which is faster, ends lower still, and
    what GPTQ found is hardly ever bettered from there.

    Args:
        start: the solver that comes before.
        steps: of Adam; its rate falls to zero in a straight line.
        rate: of V, in steps of the scale.
        scale_rate: of the logarithm of the scales, learned too (arXiv:1902.08153); 0: they stay.
    """

    start: Solver = RTN()
    steps: int = 200
    rate: float = 0.004
    scale_rate: float = 0.0
    needs_hessian = True

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be positive, got {self.steps}")
        if not self.rate > 0 or self.scale_rate < 0:
            raise ValueError(f"rates must be positive, got {self.rate} and {self.scale_rate}")

    def solve(self, weight: Tensor, grid: Grid, hessian: Tensor | None) -> Result | Split:
        if hessian is None:
            raise ValueError("LearnedRounding needs calibration data")
        if not isinstance(grid, IntGrid):
            raise TypeError(f"LearnedRounding needs evenly spaced levels, which {grid} does not have: use an IntGrid")
        found = self.start.solve(weight, grid, hessian)
        codes, (scale, zero_point) = found.codes, found.params
        if isinstance(found, Split):
            weight = weight - found.rest
        shape = (*scale.shape, -1)  # (out, groups, group_size)
        W, H, zero = weight.view(shape), hessian.to(weight.dtype), zero_point[..., None].to(weight.dtype)
        lowest, highest = int(grid.restricted) - zero, 2**grid.bits - 1 - zero
        start = codes.view(shape) - zero
        V = start + (W / scale[..., None] - start).clamp(-0.49, 0.49)
        log_scale = scale.to(weight.dtype).log()
        best, best_scale, least = start, scale, torch.full_like(weight[:, 0], torch.inf)
        of_V, of_scale = _Adam(V), _Adam(log_scale)
        for step in range(self.steps + 1):
            Q, rounded_scale = (
                torch.minimum(torch.maximum((V + zero).round() - zero, lowest), highest),
                log_scale.exp().half(),
            )
            if not step:
                Q, rounded_scale = start, scale
            error = (W - Q * rounded_scale[..., None]).view_as(weight)
            moved = error @ H
            loss = (moved * error).sum(-1)
            better = loss < least
            best, least = Q.where(better[:, None, None], best), loss.minimum(least)
            best_scale = rounded_scale.where(better[:, None], best_scale)
            # of half the loss, by Q; times the scale, by V
            gradient = -moved.view(shape) * rounded_scale[..., None]
            rate = 1 - step / self.steps
            if self.scale_rate:
                log_scale = log_scale - self.scale_rate * rate * of_scale((gradient * Q).sum(-1))
            # beyond the last level, only the way back counts
            outwards = (highest < V) & (gradient < 0) | (lowest > V) & (gradient > 0)
            V = V - self.rate * rate * of_V(gradient.masked_fill(outwards, 0))
        return found._replace(
            codes=(best + zero).to(torch.uint8).view_as(codes), params=IntParams(best_scale, zero_point)
        )


class _Adam:
    """The direction of Adam (arXiv:1412.6980) for each element by itself."""

    def __init__(self, like: Tensor) -> None:
        self.mean, self.square, self.count = torch.zeros_like(like), torch.zeros_like(like), 0

    def __call__(self, gradient: Tensor) -> Tensor:
        self.count += 1
        self.mean = self.mean.lerp(gradient, 1 - 0.9)
        self.square = self.square.lerp(gradient.square(), 1 - 0.999)
        mean, square = self.mean / (1 - 0.9**self.count), self.square / (1 - 0.999**self.count)
        # gradients scale with the inputs and the weights: an epsilon would mean something else in each layer
        return mean / square.sqrt().clamp(min=torch.finfo(square.dtype).tiny)
