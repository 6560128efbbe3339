"""EvoPress: allocations that mutate, and survive by what the whole model makes of them."""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from tersor.quant.allocation.candidates import affordable, candidates_of
from tersor.quant.allocation.divergence import swapped, text
from tersor.quant.allocation.protocol import Cost
from tersor.quant.allocation.stored_bits import StoredBits
from tersor.quant.grid import Grid
from tersor.quant.teacher import Teacher

if TYPE_CHECKING:
    from tersor.quant.recipe import Recipe

# the level of each layer: 0 is its cheapest grid
State = tuple[int, ...]
Costs = Sequence[Sequence[float]]
# divergences of some states, all of them on the same text of so many tokens
Fitness = Callable[[Sequence[State], int], list[float]]


@dataclass(frozen=True)
class Evolution:
    """EvoPress (arXiv:2410.14649): KL divergence of the whole model, not a sum over layers, decides.

    Every layer is made on every grid beforehand and held in memory, decoded, in the dtype of the model. In each
    generation the parent has offspring, of which fewer and fewer survive on more and more text, drawn anew for each
    stage; the parent takes part in the last. The start is the largest grid that all layers can have, filled up at
    random to the budget: the best of a few.

    Args:
        generations: at most; it ends early if the parent has no offspring.
        offspring: of a generation.
        survivors: of each stage of a generation; 1 of the last.
        tokens: of the text of each stage; all that there are if they are fewer.
        moves: "swap": between layers whose grids cost the same, one goes a level down and another one up, one to three
            times; what the allocation costs never changes. "any": layers of any kind go up, and any go down until the
            budget holds; no more than 10 levels change, and what goes up costs at least .8 of what goes down.
        initial: random starts to choose from.
        top_k: see `Teacher`.
        seed: of all that is drawn.
        cost: what grids cost.
    """

    generations: int = 150
    offspring: int = 128
    survivors: tuple[int, ...] = (16, 4, 1)
    tokens: tuple[int, ...] = (2048, 16384, 131072)
    moves: Literal["swap", "any"] = "swap"
    initial: int = 16
    top_k: int | None = 64
    seed: int = 0
    cost: Cost = StoredBits()

    def __post_init__(self) -> None:
        if len(self.survivors) != len(self.tokens):
            raise ValueError(
                f"survivors and tokens are of different numbers of stages: {self.survivors}, {self.tokens}"
            )
        if self.survivors[-1:] != (1,) or list(self.survivors) != sorted(self.survivors, reverse=True):
            raise ValueError(f"survivors must become fewer, down to 1, got {self.survivors}")
        if self.offspring < self.survivors[0] or self.initial < 1:
            raise ValueError(
                f"offspring must be at least {self.survivors[0]} and initial 1, got {self.offspring}, {self.initial}"
            )
        if self.moves not in ("swap", "any"):
            raise ValueError(f'moves must be "swap" or "any", got {self.moves!r}')

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
            orders = [sorted(range(len(grids)), key=of_layer.__getitem__) for of_layer in costs]
            rising = [[of_layer[option] for option in order] for of_layer, order in zip(costs, orders)]
            self._check(rising)
            teacher = Teacher(candidates.model, text(candidates, max(self.tokens), self.seed), self.top_k)
            database = {
                name: [weight.to(linear.weight) for weight in weights]
                for name, linear, weights, _ in candidates.compressed(recipe)
            }
            generator = torch.Generator().manual_seed(self.seed)

            def fitness(states: Sequence[State], tokens: int) -> list[float]:
                rows = _sample(teacher.num_tokens, tokens, generator)
                found = []
                for state in states:
                    levels = zip(candidates.weights.items(), orders, state)
                    with swapped({weight: database[name][order[level]] for (name, weight), order, level in levels}):
                        found.append(teacher.divergence(rows))
                return found

            *_, state = self.search(rising, total, fitness)
            return {name: grids[order[level]] for name, order, level in zip(candidates.linears, orders, state)}

    def search(self, costs: Costs, budget: float, fitness: Fitness) -> Iterator[State]:
        """The parent of each generation, beginning with the start.

        Args:
            costs: of each layer's levels, rising.

        Raises:
            ValueError: nothing can be swapped, as no two layers cost the same.
        """
        self._check(costs)
        rng = random.Random(self.seed)
        yield (parent := self._start(costs, budget, fitness, rng))
        for _ in range(self.generations):
            if not (children := self._children(parent, costs, budget, rng)):
                return
            for stage, (survivors, tokens) in enumerate(zip(self.survivors, self.tokens)):
                if stage == len(self.survivors) - 1:
                    # behind its children: of two that are equally good the new one goes on
                    children.append(parent)
                values = _ranked(fitness(children, tokens))
                order = sorted(range(len(children)), key=values.__getitem__)
                children = [children[i] for i in order[:survivors]]
            yield (parent := children[0])

    def _check(self, costs: Costs) -> None:
        if self.moves == "swap" and len(set(map(tuple, costs))) == len(costs):
            raise ValueError('no two layers cost the same, so that nothing can be swapped; use moves="any"')

    def _start(self, costs: Costs, budget: float, fitness: Fitness, rng: random.Random) -> State:
        levels = range(min(map(len, costs)))
        uniform = max((level for level in levels if _cost((level,) * len(costs), costs) <= budget), default=0)
        starts = {_filled((uniform,) * len(costs), costs, budget, rng): None for _ in range(self.initial)}
        if len(starts) == 1:
            return next(iter(starts))
        values = _ranked(fitness(list(starts), self.tokens[0]))
        return min(zip(values, starts))[1]

    def _children(self, parent: State, costs: Costs, budget: float, rng: random.Random) -> list[State]:
        """States that differ from their parent and from each other; fewer than wanted where few can be found."""
        children: dict[State, None] = {}
        for _ in range(20 * self.offspring):
            if self.moves == "swap":
                child = _after_swaps(parent, costs, rng)
            else:
                child = _after_moves(parent, costs, budget, rng)
            if child is not None and child != parent:
                children[child] = None
            if len(children) == self.offspring:
                break
        return list(children)


def _ranked(values: list[float]) -> list[float]:
    """A model that overflows is the worst; as NaN it would be neither worse nor better than any."""
    return [math.inf if math.isnan(value) else value for value in values]


def _cost(state: State, costs: Costs) -> float:
    return sum(of_layer[level] for of_layer, level in zip(costs, state))


def _filled(state: State, costs: Costs, budget: float, rng: random.Random) -> State:
    """`state` with levels raised at random until no other fits the budget."""
    levels, order = list(state), list(range(len(state)))
    while order:
        layer = rng.choice(order)
        levels[layer] += 1
        if levels[layer] == len(costs[layer]) or _cost(tuple(levels), costs) > budget:
            levels[layer] -= 1
            order.remove(layer)
    return tuple(levels)


def _steps(rng: random.Random) -> int:
    """The lesser of two draws of 1 to 3: mostly 1."""
    return min(rng.randint(1, 3), rng.randint(1, 3))


def _after_swaps(state: State, costs: Costs, rng: random.Random) -> State | None:
    """`state` after one to three swaps, or None if one of them is impossible."""
    levels = list(state)
    for _ in range(_steps(rng)):
        # a group is met as often as it has layers
        down = rng.randrange(len(levels))
        up = rng.choice([layer for layer, of_layer in enumerate(costs) if of_layer == costs[down]])
        if up == down or levels[down] == 0 or levels[up] == len(costs[up]) - 1:
            return None
        saved = costs[down][levels[down]] - costs[down][levels[down] - 1]
        if costs[up][levels[up] + 1] - costs[up][levels[up]] != saved:
            return None
        levels[down] -= 1
        levels[up] += 1
    return tuple(levels)


def _after_moves(state: State, costs: Costs, budget: float, rng: random.Random) -> State | None:
    """`state` after one to three layers went up and others down until the budget holds, or None if it changes too much."""
    levels, added = list(state), 0.0
    for _ in range(_steps(rng)):
        layer = rng.randrange(len(levels))
        if levels[layer] == len(costs[layer]) - 1:
            return None
        added += costs[layer][levels[layer] + 1] - costs[layer][levels[layer]]
        levels[layer] += 1
    removed = 0.0
    while _cost(tuple(levels), costs) > budget:
        layer = rng.randrange(len(levels))
        if levels[layer]:
            removed += costs[layer][levels[layer]] - costs[layer][levels[layer] - 1]
            levels[layer] -= 1
    changed = sum(abs(a - b) for a, b in zip(levels, state))
    if changed > 10 or added < 0.8 * removed:
        return None
    return tuple(levels)


def _sample(num_tokens: Sequence[int], tokens: int, generator: torch.Generator) -> list[int]:
    """Random rows that hold `tokens` together; all if there are fewer."""
    rows = []
    for row in torch.randperm(len(num_tokens), generator=generator).tolist():
        if tokens <= 0:
            break
        rows.append(row)
        tokens -= num_tokens[row]
    return sorted(rows)
