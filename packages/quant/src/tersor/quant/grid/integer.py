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

    Asymmetric: the levels span min(w, 0) ... max(w, 0) of the group (arXiv:1712.05877, section 2). Symmetric: zero_point
    is 2^(bits-1) and scale = max|w| / ((2^bits - 1) / 2), so that the end without a level is missed by half a step.
    Either way no weight that a grid was fitted to is missed by more than half a step: scales are stored in float16,
    rounded up.

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
            # groups of fewer than 8 would cost more in scales than in codes
            divisors = [d for d in range(8, in_features) if in_features % d == 0]
            nearest = sorted(divisors, key=lambda d: max(d / size, size / d))[:3]
            offer = "".join(f"{d}, " for d in nearest).removesuffix(", ") + " or None" if nearest else "None"
            raise ValueError(f"in = {in_features} is not a multiple of group_size = {size}; use group_size = {offer}")
        return in_features // size

    def fit(self, weight: Tensor) -> IntParams:
        """Scale and zero point of each group of `weight` (out, in): the extremes land on the outermost levels.

        Raises:
            ValueError: the weights are too large for scales in float16.
        """
        grouped = weight.float().unflatten(-1, (self.groups(weight.shape[-1]), -1))
        top = 2**self.bits - 1
        low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
        span = 2 * torch.maximum(-low, high) if self.symmetric else high - low
        scale = _float16_from_above(span / top)
        if not scale.isfinite().all():
            raise ValueError(
                f"weights up to {float(span.max()):.3g} need scales beyond float16; divide them by a constant"
            )
        # in a group of zeros any scale will do, but encode divides by it
        scale = scale.where(scale > 0, 1.0)
        half = torch.full_like(scale, 2 ** (self.bits - 1))
        zero_point = half if self.symmetric else (-low / scale.float()).round().clamp(0, top)
        return IntParams(scale, zero_point.to(torch.uint8))

    def encode(self, weight: Tensor, params: IntParams) -> Tensor:
        """Codes of the nearest levels (ties to even), uint8, in the shape of `weight` (out, in)."""
        scale, zero_point = (p[..., None].float() for p in params)
        steps = (weight.float().unflatten(-1, (params.scale.shape[-1], -1)) / scale).round()
        return (steps + zero_point).clamp(0, 2**self.bits - 1).to(torch.uint8).flatten(-2)

    def decode(self, codes: Tensor, params: IntParams) -> Tensor:
        """Weights, float32, in the shape of `codes` (out, in): exact, a code and a float16 scale have 8 + 11 bits."""
        scale, zero_point = (p[..., None].float() for p in params)
        return ((codes.unflatten(-1, (params.scale.shape[-1], -1)) - zero_point) * scale).flatten(-2)

    def bits_per_weight(self, out_features: int, in_features: int) -> float:
        """Bits stored per weight: codes, scales and zero points, as `QuantizedLinear` stores them."""
        groups = self.groups(in_features)
        codes = out_features * _eights(in_features) * self.bits
        zero_points = 0 if self.symmetric else _eights(out_features * groups) * self.bits
        return (codes + zero_points + 16 * out_features * groups) / (out_features * in_features)


def _float16_from_above(scale: Tensor) -> Tensor:
    """Smallest float16 that is not below `scale`, which is not negative."""
    half = scale.half()
    # float16 numbers that are not negative are in the order of their bits, read as integers
    return (half.view(torch.int16) + (half < scale)).view(torch.float16)


def _eights(count: int) -> int:
    return -(-count // 8) * 8
