"""Inputs rounded to integers as they come: each token has its own scale."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tersor.kernels import quantize_per_token
from tersor.quant.grid import Grid, IntegerGrid, IntGrid
from tersor.quant.grid.protocol import Stored, groups


@dataclass(frozen=True)
class IntActivation:
    """x^ = s round(x / s), s = clip max|x| / (2^(bits-1) - 1) of each token and group: dynamic, symmetric.

    With weights on an `IntegerGrid` (`IntGrid` of any width, `DualGrain`), products are those of integers, if a token is
    one group or its groups are the grid's: so CPUs decode faster, as in llama.cpp, for half a percent of error in the
    inputs (`recipes.gptq(4, 128, activation_bits=8)`).
    Otherwise the rounded x multiplies the decoded weight: the loss of quality is real, the gain in speed is not.

    Args:
        bits: 2 to 8.
        group_size: channels that share a scale; must divide the layer's `in`. None: the whole token.
        clip: share of the largest magnitude that is not clipped: .9 in QuaRot at 4 bits (arXiv:2404.00456, section 4).
    """

    bits: int = 8
    group_size: int | None = None
    clip: float = 1.0

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits must be 2 to 8, got {self.bits}")
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group_size must be positive or None (one group per token), got {self.group_size}")
        if not 0 < self.clip <= 1:
            raise ValueError(f"clip must be above 0 and at most 1, got {self.clip}")

    def check(self, grid: Grid, in_features: int) -> None:
        groups(in_features, self.group_size)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (..., in), int8, and scales (..., groups), float32 (float64 for float64)."""
        return quantize_per_token(x, self.bits, self.group_size, self.clip)

    def quantise(self, x: Tensor) -> Tensor:
        codes, scale = self.encode(x)
        return (codes.unflatten(-1, (scale.shape[-1], -1)) * scale[..., None]).flatten(-2).to(x.dtype)

    def prepare(self, grid: Grid, stored: Stored, shape: tuple[int, int]) -> tuple[Any, ...]:
        integers = self._integers(grid)
        return integers.prepare_integers(stored, shape) if integers else grid.prepare(stored, shape)

    def linear(self, x: Tensor, grid: Grid, *prepared: Any) -> Tensor:
        if integers := self._integers(grid):
            codes, scale = self.encode(x)
            return integers.integer_linear(codes, scale, *prepared).to(x.dtype)
        return grid.linear(self.quantise(x), *prepared)

    def _integers(self, grid: Grid) -> IntegerGrid | None:
        if self.group_size is None:
            return grid if isinstance(grid, IntegerGrid) else None
        return grid if isinstance(grid, IntGrid) and grid.group_size == self.group_size else None
