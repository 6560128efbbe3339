"""Inputs rounded to integers with a zero point, for products of bit planes."""

from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor

from tersor.kernels import bit_planes, bitplane_linear
from tersor.quant.grid import BitBalance, Grid, IntGrid
from tersor.quant.grid.protocol import Stored

# more products of two bytes than that may not fit in int32
_MAX_GROUP = 2**15


@dataclass(frozen=True)
class PlaneActivation:
    """x^ = s (q - z), q = 0 ... 2^bits - 1: each token's levels span min(x, 0) ... max(x, 0) (ABQ-LLM, arXiv:2408.08554).

    With weights on an `IntGrid` of any width, or on a `BitBalance`, products are those of bit planes
    (`tersor.kernels.bitplane_linear`), whose time grows with bits times bits: on processors without binary products
    only those of 1 bit each are as fast as products of int8, and 2 by 8 bits take 3.5 times as long. Otherwise, and where
    zero points of the weights are no integers, the rounded x multiplies the decoded weight.

    Args:
        bits: 1 to 8.
    """

    bits: int = 8

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError(f"bits must be 1 to 8, got {self.bits}")

    def check(self, grid: Grid, in_features: int) -> None:
        if has_planes(grid):
            check_group(in_features // grid.groups(in_features))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes (..., in) and zero points (...), uint8, and scales (...), float32 (float64 for float64)."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        low, high, top = x.amin(-1).clamp(max=0), x.amax(-1).clamp(min=0), 2**self.bits - 1
        scale = (high - low) / top
        # a token of zeros is 0 / 1
        scale = torch.where(scale > 0, scale, 1.0)
        zero_point = (-low / scale).round()
        codes = ((x / scale[..., None]).round() + zero_point[..., None]).clamp(0, top)
        return codes.to(torch.uint8), zero_point.to(torch.uint8), scale

    def quantise(self, x: Tensor) -> Tensor:
        codes, zero_point, scale = self.encode(x)
        return ((codes.to(scale.dtype) - zero_point[..., None]) * scale[..., None]).to(x.dtype)

    def prepare(self, grid: Grid, stored: Stored, shape: tuple[int, int]) -> tuple[Any, ...]:
        if not has_planes(grid):
            return grid.prepare(stored, shape)
        codes, params = grid.unpack(stored, shape)
        scale = params.scale
        zero_point = params.zero_point if isinstance(grid, IntGrid) else torch.full_like(codes[:, :1], grid.zero_point)
        groups = scale.shape[1]
        planes = bit_planes(codes, grid.bits, groups)
        return planes, scale, zero_point.expand_as(scale).contiguous(), shape[1] // groups

    def linear(self, x: Tensor, grid: Grid, *prepared: Any) -> Tensor:
        if not has_planes(grid):
            return grid.linear(self.quantise(x), *prepared)
        codes, zero_point, scale = self.encode(x)
        planes = bit_planes(codes, self.bits, prepared[0].shape[1])
        return bitplane_linear(planes, scale, zero_point, *prepared).to(x.dtype)


def has_planes(grid: Grid) -> TypeGuard[IntGrid | BitBalance]:
    """Whether the levels of `grid` are integers, less an integer, times a scale."""
    return isinstance(grid, BitBalance) or (isinstance(grid, IntGrid) and not grid.float_zero)


def check_group(group_size: int) -> None:
    if group_size > _MAX_GROUP:
        raise ValueError(
            f"sums of {group_size} products may not fit in int32; use a group_size of at most {_MAX_GROUP}"
        )
