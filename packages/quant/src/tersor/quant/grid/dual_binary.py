"""Two bits per weight, as two binary matrices with scales of their own."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from tersor.kernels import lookup_linear, pack_bits, unpack_bits
from tersor.quant.grid.codebook import as_float16
from tersor.quant.grid.protocol import Buffer, Stored, bits_of, check_group_size, groups


class DualBinaryParams(NamedTuple):
    a1: Tensor  # (out, groups), float16, not negative
    a2: Tensor  # (out, groups), float16, from -a1 to 0


@dataclass(frozen=True)
class DualBinary:
    """w^ = a1 b1 + a2 b2 with b1 and b2 of 0 and 1: levels a2, 0, a1 + a2, a1 (arXiv:2402.11960).

    Fitted as -s, 0, s, 2s, the levels of a 2-bit integer grid, with the smallest s by which no weight is missed by more
    than s / 2; from there a1 and a2 are learnt. Two scales for each group of 64 make 2.5 bits of the paper's 2.

    Args:
        group_size: input channels that share a1 and a2; must divide the layer's `in`. None: the whole row.
    """

    group_size: int | None = 64
    bits = 2
    per_row = True

    def __post_init__(self) -> None:
        check_group_size(self.group_size)

    def groups(self, in_features: int) -> int:
        return groups(in_features, self.group_size)

    def check(self, out_features: int, in_features: int) -> None:
        self.groups(in_features)

    def whole(self) -> Self:
        return replace(self, group_size=None)

    def fit(self, weight: Tensor) -> DualBinaryParams:
        grouped = weight.float().unflatten(-1, (self.groups(weight.shape[-1]), -1))
        # -s reaches down to -1.5 s, 2 s up to 2.5 s
        scale = torch.maximum(grouped.amax(-1) / 2.5, -grouped.amin(-1) / 1.5)
        a1 = as_float16(2 * scale)
        return DualBinaryParams(a1, -a1 / 2)

    def refit(self, weight: Tensor, params: DualBinaryParams) -> DualBinaryParams:
        return self.fit(weight)

    def encode(self, weight: Tensor, params: DualBinaryParams) -> Tensor:
        """Codes 2 b1 + (1 - b2), uint8: 0 ... 3 in the order of the levels, of two equally near ones the lower or a1."""
        a1, a2 = (p.float()[..., None] for p in params)
        W = weight.float().unflatten(-1, (a1.shape[1], -1))
        b1 = ((a1 + a2) / 2 <= W).to(torch.uint8)
        b2 = (W - a1 * b1 <= a2 / 2).to(torch.uint8)
        return (2 * b1 + 1 - b2).flatten(-2)

    def decode(self, codes: Tensor, params: DualBinaryParams) -> Tensor:
        a1, a2 = (p.float()[..., None] for p in params)
        b1, b2 = (b.unflatten(-1, (a1.shape[1], -1)) for b in _planes(codes))
        return (a1 * b1 + a2 * b2).flatten(-2)

    def layout(self, out_features: int, in_features: int) -> dict[str, Buffer]:
        return {
            "planes": Buffer((out_features, -(-2 * in_features // 8)), torch.uint8),
            "scale_bits": Buffer((out_features, 2 * self.groups(in_features)), torch.int16),
        }

    def pack(self, codes: Tensor, params: DualBinaryParams) -> dict[str, Tensor]:
        """[b1 b2], (out, 2 in) bits, and [a1 a2]."""
        return {"planes": pack_bits(torch.cat(_planes(codes), -1), 1), "scale_bits": bits_of(torch.cat(params, -1))}

    def unpack(self, stored: Stored, shape: tuple[int, int]) -> tuple[Tensor, DualBinaryParams]:
        b1, b2 = unpack_bits(stored["planes"], 1, 2 * shape[1]).chunk(2, -1)
        a1, a2 = stored["scale_bits"].view(torch.float16).chunk(2, -1)
        return 2 * b1 + 1 - b2, DualBinaryParams(a1.contiguous(), a2.contiguous())

    def prepare(self, stored: Stored, shape: tuple[int, int]) -> tuple[Any, ...]:
        scale = stored["scale_bits"].view(torch.float16)
        codebook = torch.tensor([0.0, 1.0], device=scale.device)
        return stored["planes"], codebook, scale, 1, 2 * shape[1] // scale.shape[1]

    def linear(self, x: Tensor, *prepared: Any) -> Tensor:
        """x W^T = [x x] [a1 b1, a2 b2]^T: one product with bits."""
        return lookup_linear(torch.cat([x, x], -1), *prepared)


def _planes(codes: Tensor) -> tuple[Tensor, Tensor]:
    """b1 and b2, uint8, of codes (out, in)."""
    return codes >> 1, 1 - (codes & 1)
