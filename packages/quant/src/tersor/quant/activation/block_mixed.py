"""Inputs in blocks of channels, each of a width that calibration data has chosen."""

from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from tersor.quant.grid import Grid
from tersor.quant.grid.protocol import Stored, groups


@dataclass(frozen=True)
class BlockMixedActivation:
    """x^ = s round(x / s), s = max|x| / (2^(bits-1) - 1) of each token and block; blocks with outliers have more bits.

    FMPQ of COMET (arXiv:2410.12168, section 3.2). A channel is an outlier if its largest magnitude on the calibration data is
    above `tau` times that of the median channel; `PermuteResidual` and `PermuteIntermediate` gather them beforehand.
    The rounded x multiplies the decoded weight: the loss of quality is real, the gain in speed is not. COMET's comes from
    tensor cores for 4 bits, which GPUs from Hopper on do not have.

    Args:
        group_size: channels in a block; must divide the layer's `in`.
        high_bits, low_bits: of the blocks with outliers, and of the others; 2 to 8.
        tau: the paper's threshold is of this size; from 8 to 20 little changes.
        high_groups: the blocks of a layer that have `high_bits`; what `quantize` finds. None: not known yet.
    """

    group_size: int = 128
    high_bits: int = 8
    low_bits: int = 4
    tau: float = 10.0
    high_groups: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name, bits in (("high_bits", self.high_bits), ("low_bits", self.low_bits)):
            if not 2 <= bits <= 8:
                raise ValueError(f"{name} must be 2 to 8, got {bits}")
        if self.group_size < 1:
            raise ValueError(f"group_size must be positive, got {self.group_size}")
        if not self.tau > 0:
            raise ValueError(f"tau must be positive, got {self.tau}")

    def check(self, grid: Grid, in_features: int) -> None:
        groups(in_features, self.group_size)

    def fit(self, maxima: Tensor, padding: int = 0) -> Self:
        outliers = F.pad(maxima > self.tau * maxima.median(), (0, padding)).unflatten(-1, (-1, self.group_size)).any(-1)
        return replace(self, high_groups=tuple(outliers.nonzero().flatten().tolist()))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (..., in), int8, and scales (..., blocks), float32 (float64 for float64)."""
        if self.high_groups is None:
            raise ValueError("BlockMixedActivation does not know its outliers yet: quantize finds them, or fit(maxima)")
        grouped = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, self.group_size))
        top = grouped.new_full(grouped.shape[-2:-1], 2 ** (self.low_bits - 1) - 1)
        top[list(self.high_groups)] = 2 ** (self.high_bits - 1) - 1
        scale = grouped.abs().amax(-1) / top
        # a block of zeros is 0 / 1
        scale = torch.where(scale > 0, scale, 1.0)
        codes = (grouped / scale[..., None]).round()
        return codes.maximum(-top[:, None]).minimum(top[:, None]).to(torch.int8).flatten(-2), scale

    def quantise(self, x: Tensor) -> Tensor:
        codes, scale = self.encode(x)
        return (codes.unflatten(-1, (scale.shape[-1], -1)) * scale[..., None]).flatten(-2).to(x.dtype)

    def prepare(self, grid: Grid, stored: Stored, shape: tuple[int, int]) -> tuple[Any, ...]:
        return grid.prepare(stored, shape)

    def linear(self, x: Tensor, grid: Grid, *prepared: Any) -> Tensor:
        return grid.linear(self.quantise(x), *prepared)
