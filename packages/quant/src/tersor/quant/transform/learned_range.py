"""Learned clipping: how much of each row's range is worth its levels, by gradient descent through the block."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tersor.quant.blocks import linears
from tersor.quant.calibration import BlockInputs, token_rows
from tersor.quant.grid import Grid, IntGrid
from tersor.quant.processes import over_processes


@dataclass(frozen=True)
class LearnedRange:
    """Each row's levels span sigmoid(g) of its weights' range; g is learnt before the solver rounds (arXiv:2311.09550).

    Adam on the squared difference between the block's outputs and those with weights rounded to nearest (straight
    through), from sigmoid(4) = .982 on. One g serves both ends of the range and all groups of a row. The ranges are
    given to the solver's grid and the weights stay as they are: so GPTQ makes up for what is clipped off, too, where
    weights that are clamped first would leave it nothing to see. A block that would lose more than with whole ranges,
    rounded to nearest either way, keeps those.

    Args:
        steps: of Adam, each on one batch of the calibration data.
        rate: of g; falls to zero in a straight line.
    """

    steps: int = 200
    rate: float = 0.1

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be positive, got {self.steps}")
        if not self.rate > 0:
            raise ValueError(f"rate must be positive, got {self.rate}")

    def ranges(
        self, block: nn.Module, inputs: Sequence[BlockInputs], index: int, grids: Mapping[nn.Linear, Grid]
    ) -> dict[nn.Linear, Tensor]:
        names = {linear: f"{name}.weight" for name, linear in linears(block).items() if linear in grids}
        rounding = {linear: _Rounding(linear.weight, grid) for linear, grid in grids.items()}
        learnt = {linear: torch.full_like(linear.weight[:, :1], 4.0, dtype=torch.float32) for linear in grids}
        wanted = [each.run(index, block) for each in inputs]

        def loss(batch: int, shares: Mapping[nn.Linear, Tensor]) -> Tensor:
            """Sum of squares, over the tokens of a batch."""
            each = inputs[batch]
            weights = {name: rounding[linear](shares[linear]) for linear, name in names.items()}
            changed: Any = partial(_call, block, weights)
            output = each.run(index, changed)
            return token_rows(output - wanted[batch], each.mask).float().square().sum()

        def total(shares: Mapping[nn.Linear, Tensor]) -> float:
            return float(over_processes(torch.stack([loss(batch, shares) for batch in range(len(inputs))]).sum()))

        optimiser = torch.optim.Adam(list(learnt.values()), self.rate)
        for step in range(self.steps):
            with torch.enable_grad():
                for g in learnt.values():
                    g.requires_grad_()
                gradients = torch.autograd.grad(
                    loss(step % len(inputs), {linear: g.sigmoid() for linear, g in learnt.items()}),
                    list(learnt.values()),
                    # an expert may see none of the batch's tokens
                    allow_unused=True,
                )
            for g, gradient in zip(learnt.values(), gradients):
                g.requires_grad_(False)
                g.grad = over_processes(torch.zeros_like(g) if gradient is None else gradient)
            optimiser.param_groups[0]["lr"] = self.rate * (1 - step / self.steps)
            optimiser.step()
        shares = {linear: g.sigmoid() for linear, g in learnt.items()}
        whole = {linear: torch.ones_like(g) for linear, g in learnt.items()}
        return shares if total(shares) < total(whole) else {}


class _Rounding:
    """A weight rounded to nearest in a share of its range, with the share's gradient."""

    def __init__(self, weight: Tensor, grid: Grid) -> None:
        if not isinstance(grid, IntGrid):
            raise TypeError(f"LearnedRange needs evenly spaced levels, which {grid} does not have: use an IntGrid")
        scale, zero_point = grid.fit(weight)
        # scale and range shrink alike: the zero point stays
        self.scale, self.zero_point = scale[..., None].float(), zero_point[..., None].float()
        self.weight = weight.detach().float().unflatten(-1, (scale.shape[1], -1))
        self.lowest, self.highest, self.dtype = int(grid.restricted), 2**grid.bits - 1, weight.dtype

    def __call__(self, share: Tensor) -> Tensor:
        scale = self.scale * share[..., None]
        steps = self.weight / scale + self.zero_point
        codes = (steps + (steps.round() - steps).detach()).clamp(self.lowest, self.highest)
        return ((codes - self.zero_point) * scale).flatten(-2).to(self.dtype)


def _call(block: nn.Module, weights: dict[str, Tensor], *arguments: Any, **keywords: Any) -> Any:
    return functional_call(block, weights, arguments, keywords)
