"""The linears that an allocation finds grids for, and what each of them would become."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from tersor.quant.allocation.protocol import Cost
from tersor.quant.calibration import batches, block_inputs
from tersor.quant.experts import has_fused_experts, separate_experts
from tersor.quant.grid import Grid
from tersor.quant.layers import advance, layers_by_input, solve
from tersor.quant.quantize import evaluating, fold_model, searched
from tersor.quant.survey import calibration_batches, check_model, planned, schemes_of
from tersor.quant.transform import BlockTransform, OnlineTransform, SearchedTransform

if TYPE_CHECKING:
    from tersor.quant.recipe import Recipe


class Compressed(NamedTuple):
    """What a layer would become.

    Args:
        weights: (out, in) on each grid, decoded, float32.
        hessian: second moments (in, in) of what the dense model gives the layer, where they were asked for.
    """

    name: str
    linear: nn.Linear
    weights: list[Tensor]
    hessian: Tensor | None


@dataclass(frozen=True)
class Candidates:
    """The linears that `quantize` would replace, and the grids that there are for each.

    Args:
        model: with the transforms of the recipe folded into a copy, if it has any that fold.
        found: the linears by name, for each of `blocks`.
        recipe: with what its transforms have chosen, if some of them search.
        data: calibration data, as `batches` returns it; empty if there is none.
    """

    model: Any
    blocks: nn.ModuleList
    found: list[dict[str, nn.Linear]]
    grids: tuple[Grid, ...]
    recipe: "Recipe"
    data: list[dict[str, Tensor]]

    @property
    def linears(self) -> dict[str, nn.Linear]:
        """All of them by name."""
        return {name: linear for layers in self.found for name, linear in layers.items()}

    @property
    def weights(self) -> dict[str, Tensor]:
        """Their parameters (out, in)."""
        return {name: linear.weight for name, linear in self.linears.items()}

    def padding(self, linear: nn.Linear, grid: Grid) -> int:
        """Columns of zeros that are added to its weight on `grid`."""
        scheme = replace(self.recipe.scheme, grid=grid)
        return scheme.padded(linear.out_features, linear.in_features).padding if self.recipe.pad else 0

    def compressed(self, recipe: "Recipe", with_moments: bool = False) -> Iterator[Compressed]:
        """What `recipe` makes of each layer, on the inputs of the dense model; the model stays as it is.

        Args:
            with_moments: collect second moments even if the recipe does without.
        """
        running = block_inputs(self.model, self.blocks, self.data) if recipe.needs_hessian or with_moments else []
        for index, block in enumerate(self.blocks):
            for layers, moments in layers_by_input(block, self.found[index], running, index):
                weights: dict[str, list[Tensor]] = {name: [] for name in layers}
                for grid in self.grids:
                    schemes = schemes_of(replace(recipe, grid=grid), {}, layers)
                    for name, layer in solve(layers, recipe, schemes, moments):
                        weights[name].append(layer.dequantize())
                hessian = moments.mean if moments else None
                for name, linear in layers.items():
                    yield Compressed(name, linear, weights[name], hessian)
            advance(block, running, index)


@contextmanager
def candidates_of(
    model: Any, grids: Sequence[Grid], recipe: "Recipe", calibration: Any, keep: Sequence[str]
) -> Iterator[Candidates]:
    """What there is to choose from; inside, nothing is dropped out.

    Raises:
        ValueError: there are no grids; whatever `quantize` raises before it changes anything.
    """
    if not grids:
        raise ValueError("grids must hold at least one grid to choose, got none")
    check_model(model, keep)
    if has_fused_experts(model) or not all(isinstance(change, OnlineTransform) for change in recipe.transforms):
        model = copy.deepcopy(model)
        separate_experts(model, keep)
    plans = [planned(model, replace(recipe, grid=grid), keep, {}) for grid in grids]
    blocks, found, _ = plans[0]
    if recipe.needs_data:
        data = calibration_batches(calibration, found)
    else:
        data = [] if calibration is None else batches(calibration)
    with evaluating(model):
        recipe = _folded(model, blocks, found, recipe, data)
        yield Candidates(model, blocks, found, tuple(grids), recipe, data)


def affordable(candidates: Candidates, cost: Cost, budget: float | Grid) -> tuple[tuple[tuple[float, ...], ...], float]:
    """What each grid costs in each layer, and what they may cost together.

    Raises:
        ValueError: that is less than the cheapest grids take.
    """
    scale = cost.scale(candidates)
    if isinstance(budget, Grid):
        # measured together with the others
        table = cost.costs(replace(candidates, grids=(*candidates.grids, budget)))
        budget = sum(table[name].pop() for name in candidates.linears) / scale
    else:
        table = cost.costs(candidates)
    costs = tuple(tuple(table[name]) for name in candidates.linears)
    # a budget that is just what one grid takes, as a rounded quotient, pays for that grid
    total = budget * scale * (1 + 2**-40)
    if (least := sum(map(min, costs))) > total:
        raise ValueError(f"budget = {budget} {cost.unit} is too small: the cheapest grids take {least / scale:.6g}")
    return costs, total


def _folded(
    model: Any,
    blocks: nn.ModuleList,
    found: list[dict[str, nn.Linear]],
    recipe: "Recipe",
    data: list[dict[str, Tensor]],
) -> "Recipe":
    """Fold the recipe's transforms into `model`, as the walk does it; the recipe with what they have chosen.

    Those that learn by gradients (`TaughtTransform`, `RangeTransform`) are left out: losses are predicted without them.
    """
    fold_model(model, recipe, data)
    need_inputs = any(isinstance(change, BlockTransform | SearchedTransform) for change in recipe.transforms)
    running = block_inputs(model, blocks, data) if need_inputs else []
    grids = {linear: recipe.grid for layers in found for linear in layers.values()}
    recipe = searched(recipe, blocks, running, grids)
    changes = [change for change in recipe.transforms if isinstance(change, BlockTransform)]
    for index, block in enumerate(blocks):
        for change in changes:
            change.check_block(block, running, index)
    for index, block in enumerate(blocks):
        for change in changes:
            change.fold_block(block, running, index, grids)
        advance(block, running, index)
    return recipe
