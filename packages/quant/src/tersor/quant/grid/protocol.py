"""What solvers, layers and checkpoints ask of a grid."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

# a NamedTuple of tensors, each grid its own
Params = Any
Stored = Mapping[str, Tensor]


class Buffer(NamedTuple):
    """A stored tensor. Of integers always: neither `model.to(dtype)` nor a loader then rounds what is a float16's bits."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@runtime_checkable
class Grid(Protocol):
    """Which numbers a weight (out, in) may become, and how they are stored: a frozen dataclass of plain values.

    `per_row`: rows are fitted by themselves, and the first dimension of every parameter is the row. The walk then
    solves layers that share their input as one tall weight.
    """

    @property
    def per_row(self) -> bool: ...

    def check(self, out_features: int, in_features: int) -> None:
        """Raises ValueError, with a way out, if a weight of this shape does not suit the grid."""
        ...

    def fit(self, weight: Tensor) -> Params:
        """Parameters for `weight` (out, in), rounded as they will be stored."""
        ...

    def encode(self, weight: Tensor, params: Params) -> Tensor:
        """Codes of `weight`: uint8 in its shape where a code stands for one weight; otherwise the grid's own."""
        ...

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        """The weights (out, in) that the codes stand for, float32."""
        ...

    def layout(self, out_features: int, in_features: int) -> dict[str, Buffer]:
        """What is stored for a weight of this shape, and all of it: bits per weight are counted here."""
        ...

    def pack(self, codes: Tensor, params: Params) -> dict[str, Tensor]:
        """Codes and parameters, as laid out."""
        ...

    def unpack(self, stored: Stored, shape: tuple[int, int]) -> tuple[Tensor, Params]:
        """Codes and parameters again; `shape` is the weight's (out, in)."""
        ...

    def prepare(self, stored: Stored, shape: tuple[int, int]) -> tuple[Any, ...]:
        """What `linear` takes besides x, made once per layer and never stored."""
        ...

    def linear(self, x: Tensor, *prepared: Any) -> Tensor:
        """x W^T (..., out) for x (..., in), in the dtype of x; no gradient but that of x."""
        ...


@runtime_checkable
class ScalarGrid(Grid, Protocol):
    """A code for each weight, and parameters (rows, groups) for `group_size` neighbours in a row.

    A parameter with one column only is shared by all groups of a row; one with one row only by all rows.
    """

    @property
    def group_size(self) -> int | None: ...

    def groups(self, in_features: int) -> int:
        """Groups of a row; ValueError, with the way out, if the group size does not divide it."""
        ...

    def whole(self) -> Self:
        """The same grid with one group per row: for weights (rows, columns) that lie in one group."""
        ...

    def refit(self, weight: Tensor, params: Params) -> Params:
        """As `fit`, but what `params` shares among groups or rows stays as it is."""
        ...


@runtime_checkable
class IntegerGrid(Grid, Protocol):
    """A grid whose codes are integers of at most 8 bits, up to scales and zero points: they multiply integers exactly."""

    def prepare_integers(self, stored: Stored, shape: tuple[int, int]) -> tuple[Any, ...]:
        """What `integer_linear` takes besides x and its scales, made once per layer and never stored."""
        ...

    def integer_linear(self, x: Tensor, x_scale: Tensor, *prepared: Any) -> Tensor:
        """(x_scale x) W^T (..., out), in the dtype of x_scale, for x (..., in) of int8 and x_scale (..., 1).

        Where the grid's groups have scales of their own at run time, x_scale may be (..., groups).
        """
        ...


def of_groups(params: Params, groups: slice) -> Params:
    """The parameters of some groups of a `ScalarGrid`."""
    return type(params)(*(p if p.shape[1] == 1 else p[:, groups] for p in params))


def bits_per_weight(grid: Grid, out_features: int, in_features: int) -> float:
    """Bits stored per weight, counted from the grid's buffers."""
    buffers = grid.layout(out_features, in_features).values()
    nbytes = sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in buffers)
    return 8 * nbytes / (out_features * in_features)


def check_group_size(group_size: int | None) -> None:
    """Raises ValueError if no weights can share a scale so."""
    if group_size is not None and group_size < 1:
        raise ValueError(f"group_size must be positive or None (one group per row), got {group_size}")


def groups(in_features: int, group_size: int | None) -> int:
    """Groups of `group_size` (None: one) in a row of `in_features` weights.

    Raises:
        ValueError: the group size does not divide it.
    """
    size = group_size or in_features
    if in_features % size:
        # groups of fewer than 8 would cost more in scales than in codes
        divisors = [d for d in range(8, in_features) if in_features % d == 0]
        nearest = sorted(divisors, key=lambda d: max(d / size, size / d))[:3]
        offer = "".join(f"{d}, " for d in nearest).removesuffix(", ") + " or None" if nearest else "None"
        raise ValueError(f"in = {in_features} is not a multiple of group_size = {size}; use group_size = {offer}")
    return in_features // size


def bits_of(values: Tensor) -> Tensor:
    """A floating-point tensor as integers of the same bits."""
    return values.contiguous().view(getattr(torch, {1: "uint8", 2: "int16", 4: "int32"}[values.itemsize]))
