"""Levels on both sides of zero, as many on the one as on the other."""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from tersor.kernels import pack_bits, unpack_bits
from tersor.quant.grid.codebook import CodebookGrid, ScaleParams, as_float16
from tersor.quant.grid.protocol import Buffer, Stored, check_group_size


class _Packing(NamedTuple):
    """So many codes, the digits of one number, take so many bits."""

    codes: int
    bits: int


# 3^5 = 243 numbers in 8 bits: 1.6 a code, where log2(3) = 1.585; 5^3 = 125 in 7 bits: 2.333, where log2(5) = 2.322
_PACKING = {3: _Packing(5, 8), 5: _Packing(3, 7)}


@dataclass(frozen=True)
class BitBalance(CodebookGrid):
    """Levels k * scale, k = -n ... n: an integer grid of 1 or 2 bits with a level more (ABQ-LLM, arXiv:2408.08554).

    Weights lie on both sides of zero alike, which 2^b levels with one at zero cannot do. scale = max|w| / n. The
    paper calls the grid of five levels 2 bits, "W2*"; stored are 2.333 bits per weight (1.6 of three levels) and the
    scales. In products, a code has one bit more than the paper's name says: 3 planes (2 of three levels).

    Args:
        levels: 5 or 3: 2^b + 1.
        group_size: input channels that share a scale, a float16; must divide the layer's `in`. None: the whole row.
    """

    levels: Literal[3, 5] = 5
    group_size: int | None = None

    def __post_init__(self) -> None:
        if self.levels not in _PACKING:
            raise ValueError(f"levels must be 3 or 5, got {self.levels}")
        check_group_size(self.group_size)

    @property
    def bits(self) -> int:
        """Of a code in products; stored are fewer."""
        return self.zero_point + 1

    @property
    def zero_point(self) -> int:
        """The code of zero: n."""
        return self.levels // 2

    @property
    def codebook(self) -> tuple[float, ...]:
        n = self.zero_point
        # codes that do not occur
        return tuple(float(min(code - n, n)) for code in range(2**self.bits))

    def fit(self, weight: Tensor) -> ScaleParams:
        return ScaleParams(as_float16(self.grouped(weight).abs().amax(-1) / self.zero_point))

    def nearest(self, steps: Tensor) -> Tensor:
        n = self.zero_point
        return (steps.round().clamp(-n, n) + n).to(torch.uint8)

    def layout(self, out_features: int, in_features: int) -> dict[str, Buffer]:
        of = _PACKING[self.levels]
        digits = Buffer((out_features, -(-in_features // (8 * of.codes)) * of.bits), torch.uint8)
        return {"digits": digits} | self.scale_layout(out_features, self.groups(in_features))

    def pack(self, codes: Tensor, params: ScaleParams) -> dict[str, Tensor]:
        of = _PACKING[self.levels]
        padded = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % of.codes))
        numbers = (padded.unflatten(-1, (-1, of.codes)) * self._powers(codes)).sum(-1, dtype=torch.uint8)
        return {"digits": pack_bits(numbers, of.bits)} | self.pack_scale(params)

    def unpack(self, stored: Stored, shape: tuple[int, int]) -> tuple[Tensor, ScaleParams]:
        of = _PACKING[self.levels]
        numbers = unpack_bits(stored["digits"], of.bits, -(-shape[1] // of.codes))
        codes = (numbers[..., None] // self._powers(numbers) % self.levels).flatten(-2)
        return codes[..., : shape[1]].contiguous(), self.unpack_scale(stored, shape)

    def prepare(self, stored: Stored, shape: tuple[int, int]) -> tuple[Any, ...]:
        codes, params = self.unpack(stored, shape)
        return super().prepare({"codes": pack_bits(codes, self.bits)} | super().pack_scale(params), shape)

    def _powers(self, like: Tensor) -> Tensor:
        of = _PACKING[self.levels]
        return torch.tensor([self.levels**i for i in range(of.codes)], dtype=torch.uint8, device=like.device)
