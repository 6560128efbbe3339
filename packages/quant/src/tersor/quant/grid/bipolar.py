"""Odd integers: each bit is a sign."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tersor.kernels import bit_planes, dequant_matmul, pack_bits
from tersor.kernels.bitplane_linear import plane_codes
from tersor.quant.grid.codebook import CodebookGrid, ScaleParams, as_float16
from tersor.quant.grid.protocol import Buffer, Stored, check_group_size


@dataclass(frozen=True)
class BipolarInt(CodebookGrid):
    """Levels v * scale, v = sum_i (2 b_i - 1) 2^i: the odd integers from -(2^bits - 1) to 2^bits - 1 (arXiv:2409.17870).

    The same levels as those of an asymmetric grid with steps of 2 * scale and its zero point at half a step, but with
    inputs of the same kind (`BipolarActivation`) there is nothing to correct in products of bit planes. Zero is no
    level: what is zero, in a sparse weight, say, becomes +-scale. scale = max|w| / (2^bits - 1), so no weight is missed
    by more than it; at 1 bit mean|w|, the best one, as of `BinaryGrid`. Stored are bit planes, each group's padded to
    whole bytes.

    Args:
        bits: 1 to 8.
        group_size: input channels that share a scale, a float16; must divide the layer's `in`. None: the whole row.
    """

    bits: int = 4  # pyright: ignore[reportIncompatibleMethodOverride]
    group_size: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError(f"bits must be 1 to 8, got {self.bits}")
        check_group_size(self.group_size)

    @property
    def codebook(self) -> tuple[float, ...]:
        return tuple(map(float, range(1 - 2**self.bits, 2**self.bits, 2)))

    def fit(self, weight: Tensor) -> ScaleParams:
        magnitudes = self.grouped(weight).abs()
        return ScaleParams(
            as_float16(magnitudes.mean(-1) if self.bits == 1 else magnitudes.amax(-1) / (2**self.bits - 1))
        )

    def nearest(self, steps: Tensor) -> Tensor:
        return bipolar_codes(steps, self.bits)

    def layout(self, out_features: int, in_features: int) -> dict[str, Buffer]:
        groups = self.groups(in_features)
        planes = Buffer((out_features, groups, self.bits, -(-in_features // groups // 8)), torch.uint8)
        return {"planes": planes} | self.scale_layout(out_features, groups)

    def pack(self, codes: Tensor, params: ScaleParams) -> dict[str, Tensor]:
        return {"planes": bit_planes(codes, self.bits, params.scale.shape[1])} | self.pack_scale(params)

    def unpack(self, stored: Stored, shape: tuple[int, int]) -> tuple[Tensor, ScaleParams]:
        params = self.unpack_scale(stored, shape)
        return plane_codes(stored["planes"], shape[1] // params.scale.shape[1]).flatten(-2), params

    def prepare(self, stored: Stored, shape: tuple[int, int]) -> tuple[Any, ...]:
        codes, (scale,) = self.unpack(stored, shape)
        step = 2 * scale.float()
        half = torch.full_like(step, (2**self.bits - 1) / 2)
        return pack_bits(codes, self.bits), step, half, self.bits, shape[1] // scale.shape[1]

    def linear(self, x: Tensor, *prepared: Any) -> Tensor:
        return dequant_matmul(x, *prepared)


def bipolar_codes(steps: Tensor, bits: int) -> Tensor:
    """Codes b, uint8, whose odd integers 2 b - (2^bits - 1) are nearest to `steps`."""
    top = 2**bits - 1
    return ((steps + top) / 2).round().clamp(0, top).to(torch.uint8)
