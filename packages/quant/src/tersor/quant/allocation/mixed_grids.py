"""An allocation as part of a recipe."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tersor.quant.allocation.protocol import Allocator
from tersor.quant.grid import Grid

if TYPE_CHECKING:
    from tersor.quant.recipe import Recipe


@dataclass(frozen=True)
class MixedGrids:
    """Grids that layers choose from, so that all cost together what the recipe's own grid would.

    Args:
        grids: what there is to choose from; the recipe's own need not be among them.
        allocator: what chooses. Its cost is what is counted: stored bits, or measured time.
    """

    grids: tuple[Grid, ...]
    allocator: Allocator

    def choose(
        self, model: Any, recipe: "Recipe", calibration: Any = None, keep: Sequence[str] = ()
    ) -> dict[str, Grid]:
        """A grid for each linear that `quantize(model, recipe, calibration, keep=keep)` replaces; for its `allocation`."""
        recipe = replace(recipe, allocation=None)
        return self.allocator.allocate(model, self.grids, recipe, calibration, recipe.grid, keep=keep)
