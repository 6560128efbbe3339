"""How one layer is stored and computed."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Self

from tersor.quant import activation, compensation, grid, transform
from tersor.quant.activation import Activation
from tersor.quant.compensation import Compensation
from tersor.quant.grid import Grid
from tersor.quant.transform import OnlineTransform

# of zeros that are tried: groups are smaller
_MOST = 1024


@dataclass(frozen=True)
class Scheme:
    """What stands in place of a weight: y = activation(x T) W^^T + x T C^T.

    Args:
        grid: the numbers that W T^-T became.
        transform: T, applied to the input at run time; None: nothing.
        activation: rounds the transformed input; None: it stays as it is.
        compensation: C; None: nothing.
        padding: zeros that follow each x, and columns of W that meet them: the other pieces see them as inputs.
    """

    grid: Grid
    transform: OnlineTransform | None = None
    activation: Activation | None = None
    compensation: Compensation | None = None
    padding: int = 0

    def check(self, out_features: int, in_features: int) -> None:
        """Raises ValueError, with a way out, if a weight of this shape does not suit."""
        in_features += self.padding
        self.grid.check(out_features, in_features)
        if self.transform:
            self.transform.check(in_features)
        if self.activation:
            self.activation.check(self.grid, in_features)
        if self.compensation:
            self.compensation.check(out_features, in_features)

    def padded(self, out_features: int, in_features: int) -> Self:
        """This scheme with the fewest zeros that make a weight of this shape suit; as it is, if nothing does."""
        for padding in range(_MOST):
            scheme = replace(self, padding=padding)
            try:
                scheme.check(out_features, in_features)
            except ValueError:
                continue
            return scheme
        return self

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON takes them: each piece's class under "type", and its fields; what is not there left out."""
        pieces = {field.name: getattr(self, field.name) for field in fields(self)}
        return {axis: piece if axis == "padding" else to_dict(piece) for axis, piece in pieces.items() if piece}

    @classmethod
    def from_dict(cls, pieces: Mapping[str, Any]) -> Self:
        """The scheme that `to_dict` wrote; KeyError names a piece that is not there."""
        rooms = {"grid": grid, "transform": transform, "activation": activation, "compensation": compensation}
        made = {axis: _piece(rooms[axis], settings) for axis, settings in pieces.items() if axis != "padding"}
        return cls(**made, padding=pieces.get("padding", 0))


def to_dict(piece: Any) -> dict[str, Any]:
    return {"type": type(piece).__name__} | asdict(piece)


def _piece(room: Any, settings: Mapping[str, Any]) -> Any:
    kind = settings["type"]
    if kind not in room.__all__:
        raise KeyError(kind)
    # tuples come back from JSON as lists
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in settings.items() if name != "type"}
    return getattr(room, kind)(**values)
