"""Inputs rounded to odd integers, for products of bit planes."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tersor.kernels import bipolar_linear, bit_planes
from tersor.quant.activation.planes import check_group
from tersor.quant.grid import BipolarInt, Grid
from tersor.quant.grid.bipolar import bipolar_codes
from tersor.quant.grid.protocol import Stored


@dataclass(frozen=True)
class BipolarActivation:
    """x^ = s v, v an odd integer, s = max|x| / (2^bits - 1) of each token: no zero (arXiv:2409.17870).

    With weights on a `BipolarInt`, of any width, products are those of bit planes (`tersor.kernels.bipolar_linear`).
    Otherwise the rounded x multiplies the decoded weight. An input of zero becomes +s; so this suits inputs around zero,
    not those behind a ReLU.

    Args:
        bits: 1 to 8.
    """

    bits: int = 8

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError(f"bits must be 1 to 8, got {self.bits}")

    def check(self, grid: Grid, in_features: int) -> None:
        if isinstance(grid, BipolarInt):
            check_group(in_features // grid.groups(in_features))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (..., in), uint8, and scales (...), float32 (float64 for float64)."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = x.abs().amax(-1) / (2**self.bits - 1)
        # a token of zeros is +-1 * 0
        return bipolar_codes(x / torch.where(scale > 0, scale, 1.0)[..., None], self.bits), scale

    def quantise(self, x: Tensor) -> Tensor:
        codes, scale = self.encode(x)
        return ((2 * codes.to(scale.dtype) - (2**self.bits - 1)) * scale[..., None]).to(x.dtype)

    def prepare(self, grid: Grid, stored: Stored, shape: tuple[int, int]) -> tuple[Any, ...]:
        if not isinstance(grid, BipolarInt):
            return grid.prepare(stored, shape)
        scale = grid.unpack_scale(stored, shape).scale
        return stored["planes"], scale, shape[1] // scale.shape[1]

    def linear(self, x: Tensor, grid: Grid, *prepared: Any) -> Tensor:
        if not isinstance(grid, BipolarInt):
            return grid.linear(self.quantise(x), *prepared)
        codes, scale = self.encode(x)
        planes = bit_planes(codes, self.bits, prepared[0].shape[1])
        return bipolar_linear(planes, scale, *prepared).to(x.dtype)
