"""What the walk asks of a compensation: something added to a quantised weight that makes up for its error."""

from typing import Protocol, Self, runtime_checkable

from torch import Tensor

from tersor.quant.grid.protocol import Buffer, Stored


@runtime_checkable
class Compensation(Protocol):
    """An addition C to a layer's decoded weight, cheap to store: y = h (W^ + C)^T, h the layer's transformed input."""

    @property
    def needs_hessian(self) -> bool: ...

    def check(self, out_features: int, in_features: int) -> None: ...

    def layout(self, out_features: int, in_features: int) -> dict[str, Buffer]:
        """What is stored, integers of the same bits (see `Buffer`)."""
        ...

    def fit(self, error: Tensor, hessian: Tensor | None) -> tuple[Self, dict[str, Tensor]]:
        """The buffers that make up best for `error`, (out, in), and the piece that lays out as many.

        `error` is W - W^, or what the solver left to the compensation (see `Split`).
        """
        ...

    def decode(self, stored: Stored, shape: tuple[int, int]) -> Tensor:
        """C, float32; `shape` is (out, in)."""
        ...

    def add(self, y: Tensor, h: Tensor, stored: Stored) -> Tensor:
        """y + h C^T for h (..., in), in the dtype of y."""
        ...
