"""What an allocation solves once costs and losses are known: a knapsack with one option for each layer."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """min sum_l losses[l][o_l] subject to sum_l costs[l][o_l] <= budget, one option o_l for each layer l.

    Args:
        costs, losses: for each layer, of each of its options.

    Raises:
        ValueError: they do not fit together, are not finite, or the cheapest options cost more than the budget.
    """

    costs: tuple[tuple[float, ...], ...]
    losses: tuple[tuple[float, ...], ...]
    budget: float

    def __post_init__(self) -> None:
        if len(self.costs) != len(self.losses):
            raise ValueError(f"costs are of {len(self.costs)} layers, losses of {len(self.losses)}")
        for layer, (costs, losses) in enumerate(zip(self.costs, self.losses)):
            if not costs or len(costs) != len(losses):
                raise ValueError(
                    f"layer {layer} has {len(costs)} costs and {len(losses)} losses; give one for each option"
                )
            if not all(map(math.isfinite, (*costs, *losses))):
                raise ValueError(f"layer {layer}: costs {costs} and losses {losses} must be finite")
        if (least := sum(map(min, self.costs))) > self.budget:
            raise ValueError(f"budget = {self.budget} is less than the least possible cost, {least}")

    def cost(self, choice: tuple[int, ...]) -> float:
        """What the options cost together."""
        return sum(costs[option] for costs, option in zip(self.costs, choice))

    def loss(self, choice: tuple[int, ...]) -> float:
        """The sum of their losses."""
        return math.fsum(losses[option] for losses, option in zip(self.losses, choice))
