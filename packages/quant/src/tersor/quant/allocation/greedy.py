"""The best bargains first."""

from dataclasses import dataclass
from heapq import heapify, heappop, heappush

from tersor.quant.allocation.error import RelativeError
from tersor.quant.allocation.problem import Problem
from tersor.quant.allocation.protocol import Loss
from tersor.quant.allocation.separable import Separable


@dataclass(frozen=True)
class Greedy(Separable):
    """Begins with the cheapest options and takes the steps that save most loss per cost, while they fit the budget.

    A layer's steps lead along the lower convex hull of its points (cost, loss). The sum of losses is above the least
    possible one by no more than what one step saves, and by nothing if no step had to be turned down.
    """

    loss: Loss = RelativeError()

    def choose(self, problem: Problem) -> tuple[int, ...]:
        hulls = [_hull(costs, losses) for costs, losses in zip(problem.costs, problem.losses)]
        choice = [hull[0] for hull in hulls]
        spent = problem.cost(tuple(choice))

        def step(layer: int, corner: int) -> tuple[float, int, int]:
            """From a corner of the layer's hull to the next; the least of them saves most per cost."""
            return (
                -_saved(problem.costs[layer], problem.losses[layer], *hulls[layer][corner : corner + 2]),
                layer,
                corner,
            )

        steps = [step(layer, 0) for layer, hull in enumerate(hulls) if len(hull) > 1]
        heapify(steps)
        while steps:
            _, layer, corner = heappop(steps)
            here, there = hulls[layer][corner : corner + 2]
            extra = problem.costs[layer][there] - problem.costs[layer][here]
            # a layer whose step does not fit stays where it is
            if spent + extra <= problem.budget:
                choice[layer], spent = there, spent + extra
                if corner + 2 < len(hulls[layer]):
                    heappush(steps, step(layer, corner + 1))
        return tuple(choice)


def _hull(costs: tuple[float, ...], losses: tuple[float, ...]) -> list[int]:
    """Options at the corners of the lower convex hull, from the cheapest to the one with the least loss."""
    corners: list[int] = []
    for option in sorted(range(len(costs)), key=lambda o: (costs[o], losses[o])):
        if corners and losses[option] >= losses[corners[-1]]:
            continue
        while len(corners) > 1:
            before, last = corners[-2:]
            if _saved(costs, losses, before, last) >= _saved(costs, losses, before, option):
                break
            corners.pop()
        corners.append(option)
    return corners


def _saved(costs: tuple[float, ...], losses: tuple[float, ...], here: int, there: int) -> float:
    """Loss saved per cost by the step from option `here` to `there`."""
    return (losses[here] - losses[there]) / (costs[there] - costs[here])
