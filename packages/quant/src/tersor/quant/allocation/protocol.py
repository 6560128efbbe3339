"""What an allocation consists of."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from tersor.quant.grid import Grid

if TYPE_CHECKING:
    from tersor.quant.allocation.candidates import Candidates
    from tersor.quant.recipe import Recipe

# one number for each candidate grid, by the name of the layer
Table = dict[str, list[float]]


class Allocator(Protocol):
    @property
    def cost(self) -> "Cost": ...

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
        """A grid for each linear that `quantize(model, recipe, calibration, keep=keep)` replaces; the model stays as it is.

        Args:
            grids: what there is to choose from; the recipe's own grid counts only if it is among them.
            calibration: as of `quantize`; None: pieces that run the model feed it random tokens.
            budget: in the unit of the allocator's cost: average bits stored per weight, if nothing else is said. A grid:
                what it would cost in all layers.

        Raises:
            ValueError: the budget is less than the cheapest grids take; whatever `quantize` raises.
        """
        ...


class Loss(Protocol):
    """Predicts what each grid does to the model, layer by layer: the sum over layers is to rank allocations."""

    def losses(self, candidates: "Candidates") -> Table: ...


class Cost(Protocol):
    """What each grid costs, layer by layer.

    `unit` is that of budgets. A budget of 1 pays for costs of `scale(candidates)`.
    """

    @property
    def unit(self) -> str: ...

    def costs(self, candidates: "Candidates") -> Table: ...

    def scale(self, candidates: "Candidates") -> float: ...
