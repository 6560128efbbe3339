"""Evenly spaced levels, scaled per group of input channels."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class IntParams(NamedTuple):
    scale: Tensor  # (out, groups), float16: as stored, so that codes are chosen for the scale they are decoded with
    zero_point: Tensor  # (out, groups), uint8: the code that decodes to zero


@dataclass(frozen=True)
class IntGrid:
    """Levels (code - zero_point) * scale, code = 0 ... 2^bits - 1; zero is always a level.

    Asymmetric: the levels span min(w, 0) ... max(w, 0) of the group (arXiv:1712.05877). Symmetric: zero_point is
    2^(bits-1) and scale = max|w| / ((2^bits - 1) / 2), so that both ends are missed by at most half a step.

    Args:
        bits: bits per code, 2 to 8.
        group_size: input channels that share a scale; must divide the layer's `in`. None: the whole row.
        symmetric: spend no bits on zero points.
    """

    bits: int = 4
    group_size: int | None = 64
    symmetric: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits must be 2 to 8, got {self.bits}")
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group_size must be positive or None (one group per row), got {self.group_size}")

    def groups(self, in_features: int) -> int:
        """Groups of a row of `in_features` weights.

        Raises:
            ValueError: the group size does not divide it.
        """
        size = self.group_size or in_features
        if in_features % size:
            divisors = [d for d in (256, 128, 64, 32, 16, 8) if in_features % d == 0] or [1]
            offer = ", ".join(map(str, divisors))
            raise ValueError(f"in = {in_features} is not a multiple of group_size = {size}; it is one of {offer}")
        return in_features // size

    def fit(self, weight: Tensor) -> IntParams:
        """Scale and zero point of each group of `weight` (out, in): the extremes land on the outermost levels."""
        return self._fit(weight.float().unflatten(-1, (self.groups(weight.shape[-1]), -1)))

    def fit_group(self, weight: Tensor) -> IntParams:
        """The same of `weight` (out, group_size) as one group."""
        return self._fit(weight.float()[:, None])

    def _fit(self, grouped: Tensor) -> IntParams:
        top = 2**self.bits - 1
        if self.symmetric:
            scale = grouped.abs().amax(-1) / (top / 2)
            zero = torch.full_like(scale, 2 ** (self.bits - 1))
        else:
            low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
            scale = (high - low) / top
            zero = (-low / scale.where(scale > 0, 1.0)).round().clamp(0, top)
        # a group of zeros, or one that vanishes in float16, must not divide by zero: every weight becomes the zero level
        scale = scale.half()
        return IntParams(scale.where(scale > 0, 1.0), zero.to(torch.uint8))

    def encode(self, weight: Tensor, params: IntParams) -> Tensor:
        """Codes of the nearest levels (ties to even), uint8, in the shape of `weight` (out, in)."""
        scale, zero = self._per_weight(weight, params)
        return ((weight.float() / scale).round() + zero).clamp(0, 2**self.bits - 1).to(torch.uint8)

    def decode(self, codes: Tensor, params: IntParams) -> Tensor:
        """Weights, float32."""
        scale, zero = self._per_weight(codes, params)
        return (codes - zero) * scale

    def bits_per_weight(self, out_features: int, in_features: int) -> float:
        """Bits stored per weight: codes, scales and zero points, each padded to whole groups of eight."""
        groups = self.groups(in_features)
        codes = out_features * _eights(in_features) * self.bits
        zeros = 0 if self.symmetric else _eights(out_features * groups) * self.bits
        return (codes + zeros + 16 * out_features * groups) / (out_features * in_features)

    def _per_weight(self, weight: Tensor, params: IntParams) -> tuple[Tensor, Tensor]:
        # columns of a single group may be passed with that group's parameters alone
        columns = weight.shape[-1] // params.scale.shape[-1]
        scale, zero = (p.float().repeat_interleave(columns, -1) for p in params)
        return scale, zero


def _eights(count: int) -> int:
    return -(-count // 8) * 8
