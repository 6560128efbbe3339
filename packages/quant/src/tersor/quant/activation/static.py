"""Inputs rounded to integers with one scale per layer, known beforehand."""

from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from tersor.quant.grid import Grid, IntegerGrid
from tersor.quant.grid.protocol import Stored


@dataclass(frozen=True)
class StaticActivation:
    """x^ = s clip(round(x / s)), one s per layer: that of its largest input on the calibration data, over 2^(bits-1) - 1.

    SmoothQuant's O3 (arXiv:2211.10438, table 3) and DGQ's (arXiv:2310.04836). No token is looked at before it is rounded,
    but all share one scale, so that smoothing is needed more than with `IntActivation`; larger inputs than those seen
    saturate. With weights on an `IntegerGrid`, products are those of integers.

    Args:
        bits: 2 to 8.
        scale: s; what `quantize` finds for each layer. None: not known yet.
    """

    bits: int = 8
    scale: float | None = None

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits must be 2 to 8, got {self.bits}")
        if self.scale is not None and not self.scale > 0:
            raise ValueError(f"scale must be positive, got {self.scale}")

    def check(self, grid: Grid, in_features: int) -> None:
        """Any width will do."""

    def fit(self, maxima: Tensor, padding: int = 0) -> Self:
        largest = float(maxima.max())
        # inputs that were always zero are 0 / 1
        return replace(self, scale=largest / (2 ** (self.bits - 1) - 1) if largest else 1.0)

    def encode(self, x: Tensor) -> Tensor:
        """Codes, int8, in the shape of x."""
        top = 2 ** (self.bits - 1) - 1
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide / self._known()).round().clamp(-top, top).to(torch.int8)

    def quantise(self, x: Tensor) -> Tensor:
        codes = self.encode(x).to(torch.promote_types(x.dtype, torch.float32))
        return (codes * self._known()).to(x.dtype)

    def prepare(self, grid: Grid, stored: Stored, shape: tuple[int, int]) -> tuple[Any, ...]:
        integers = self._integers(grid)
        return integers.prepare_integers(stored, shape) if integers else grid.prepare(stored, shape)

    def linear(self, x: Tensor, grid: Grid, *prepared: Any) -> Tensor:
        if integers := self._integers(grid):
            codes, dtype = self.encode(x), torch.promote_types(x.dtype, torch.float32)
            scale = torch.full((*x.shape[:-1], 1), self._known(), dtype=dtype, device=x.device)
            return integers.integer_linear(codes, scale, *prepared).to(x.dtype)
        return grid.linear(self.quantise(x), *prepared)

    def _integers(self, grid: Grid) -> IntegerGrid | None:
        return grid if isinstance(grid, IntegerGrid) else None

    def _known(self) -> float:
        if self.scale is None:
            raise ValueError("StaticActivation has no scale yet: quantize finds it, or fit(maxima)")
        return self.scale
