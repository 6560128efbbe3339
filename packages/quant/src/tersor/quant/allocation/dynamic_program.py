"""The optimum, for costs in whole numbers."""

import math
from dataclasses import dataclass

import torch

from tersor.quant.allocation.linearity import Linearity
from tersor.quant.allocation.problem import Problem
from tersor.quant.allocation.protocol import Loss
from tersor.quant.allocation.separable import Separable

# entries of the table of what was picked: a byte each
_LARGEST_TABLE = 2**31


@dataclass(frozen=True)
class DynamicProgram(Separable):
    """The least sum of losses, layer by layer for every budget (arXiv:2411.17525): exact.

    Costs are counted from each layer's cheapest option on, in units of their greatest common divisor. O(L C options)
    time and O(L C) memory, C the budget in these units.

    Raises:
        ValueError: costs are not whole numbers, or the table would not fit into memory.
    """

    loss: Loss = Linearity()

    def choose(self, problem: Problem) -> tuple[int, ...]:
        if broken := [cost for costs in problem.costs for cost in costs if cost != int(cost)]:
            raise ValueError(f"costs must be whole numbers, got {broken[0]}; use IntegerProgram")
        extras = [[int(cost - min(costs)) for cost in costs] for costs in problem.costs]
        unit = math.gcd(*(extra for of_layer in extras for extra in of_layer)) or 1
        left = int(problem.budget - sum(map(min, problem.costs))) // unit
        left = min(left, sum(map(max, extras)) // unit)
        if len(extras) * (left + 1) > _LARGEST_TABLE:
            raise ValueError(f"{len(extras)} layers and a budget of {left} steps are too many; use IntegerProgram")
        # best[c]: the least loss of the layers so far that c units pay for
        best, picked = torch.zeros(left + 1, dtype=torch.float64), []
        for of_layer, losses in zip(extras, problem.losses):
            sums = torch.full((len(losses), left + 1), math.inf, dtype=torch.float64)
            for option, (extra, loss) in enumerate(zip(of_layer, losses)):
                units = extra // unit
                sums[option, units:] = best[: max(left + 1 - units, 0)] + loss
            best, option = sums.min(0)
            picked.append(option.to(torch.uint8))
        choice = []
        for of_layer, options in zip(reversed(extras), reversed(picked)):
            choice.append(int(options[left]))
            left -= of_layer[choice[-1]] // unit
        return tuple(reversed(choice))
