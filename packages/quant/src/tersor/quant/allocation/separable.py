"""Allocations that add up what is predicted of each layer by itself."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from tersor.quant.allocation.candidates import affordable, candidates_of
from tersor.quant.allocation.problem import Problem
from tersor.quant.allocation.protocol import Cost, Loss
from tersor.quant.allocation.stored_bits import StoredBits
from tersor.quant.grid import Grid

if TYPE_CHECKING:
    from tersor.quant.recipe import Recipe


@dataclass(frozen=True)
class Separable(ABC):
    """The least sum of losses whose sum of costs is within the budget.

    Args:
        loss: what a grid is predicted to do to a layer.
        cost: what it costs there.
    """

    loss: Loss
    cost: Cost = StoredBits()

    @abstractmethod
    def choose(self, problem: Problem) -> tuple[int, ...]:
        """One option for each layer."""

    @torch.no_grad()
    def allocate(
        self,
        model: Any,
        grids: Sequence[Grid],
        recipe: "Recipe",
        calibration: Any,
        budget: float | Grid,
        *,
        keep: Sequence[str] = (),
    ) -> dict[str, Grid]:
        """A grid for each linear to be quantised; see `Allocator`."""
        with candidates_of(model, grids, recipe, calibration, keep) as candidates:
            costs, total = affordable(candidates, self.cost, budget)
            losses = self.loss.losses(candidates)
            choice = self.choose(Problem(costs, tuple(tuple(losses[name]) for name in candidates.linears), total))
            return {name: candidates.grids[option] for name, option in zip(candidates.linears, choice)}
