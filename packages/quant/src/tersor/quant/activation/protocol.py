"""What a layer asks of a quantiser of its input."""

from typing import Any, Protocol, Self, runtime_checkable

from torch import Tensor

from tersor.quant.grid.protocol import Grid, Stored


@runtime_checkable
class Activation(Protocol):
    """Rounds a layer's input at run time, and multiplies it with the stored weight."""

    def check(self, grid: Grid, in_features: int) -> None:
        """Raises ValueError, with a way out, if this input does not go with that grid."""
        ...

    def quantise(self, x: Tensor) -> Tensor:
        """x (..., in) as the layer sees it: rounded, in the dtype of x."""
        ...

    def prepare(self, grid: Grid, stored: Stored, shape: tuple[int, int]) -> tuple[Any, ...]:
        """What `linear` takes besides x and the grid, made once per layer: as a grid's `prepare`, or for integers."""
        ...

    def linear(self, x: Tensor, grid: Grid, *prepared: Any) -> Tensor:
        """x^ W^T (..., out): by integer products where grid and kernel have them, else of `quantise(x)`."""
        ...


@runtime_checkable
class CalibratedActivation(Activation, Protocol):
    """One that looks at a layer's inputs on the calibration data first; what it finds becomes a setting of the layer's."""

    def fit(self, maxima: Tensor, padding: int = 0) -> Self:
        """The piece for a layer, given the largest magnitude of each of its input channels, (in,), and zeros after them."""
        ...
