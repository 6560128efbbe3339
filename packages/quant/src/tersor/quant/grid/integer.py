"""Evenly spaced levels, scaled per group of input channels."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from tersor.kernels import dequant_matmul, pack_bits, unpack_bits, w4a8_linear, w8a8_linear, wna8_linear
from tersor.quant.grid.protocol import Buffer, Stored, bits_of, check_group_size, groups


class IntParams(NamedTuple):
    scale: Tensor  # (out, groups), float16: as stored, so that codes are chosen for the scale they are decoded with
    # (out, groups): what decodes to zero; a code (uint8), or any number (float16) where the grid's is a float
    zero_point: Tensor


@dataclass(frozen=True)
class IntGrid:
    """Levels (code - zero_point) * scale, code = 0 ... 2^bits - 1; zero is always a level, unless `float_zero`.

    Asymmetric: the levels span min(w, 0) ... max(w, 0) of the group (arXiv:1712.05877, section 2). Symmetric: zero_point
    is 2^(bits-1) and scale = max|w| / ((2^bits - 1) / 2), so that the end without a level is missed by half a step.
    Either way no weight that a grid was fitted to is missed by more than half a step, unless `float_zero`: scales are
    stored in float16, rounded up.

    Args:
        bits: bits per code, 1 to 8.
        group_size: input channels that share a scale; must divide the layer's `in`. None: the whole row.
        symmetric: spend no bits on zero points.
        restricted: of a symmetric grid, leave the lowest code unused, so that the extremes of both signs are levels:
            scale = max|w| / (2^(bits-1) - 1), as products of int8 want it.
        float_zero: zero points are float16 and lie anywhere, as HQQ finds them: the levels span min(w) ... max(w), and
            zero too where that is about a thousand times as far away as they reach. Rounded to eleven bits, zero points
            beyond 1024 miss weights by more than half a step.
    """

    bits: int = 4
    group_size: int | None = 64
    symmetric: bool = False
    restricted: bool = False
    float_zero: bool = False
    per_row = True

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError(f"bits must be 1 to 8, got {self.bits}")
        check_group_size(self.group_size)
        if self.restricted and not (self.symmetric and self.bits > 1):
            raise ValueError("restricted is for symmetric grids of at least 2 bits")
        if self.symmetric and self.float_zero:
            raise ValueError("a symmetric grid has no zero points: float_zero is for asymmetric ones")

    def groups(self, in_features: int) -> int:
        return groups(in_features, self.group_size)

    def check(self, out_features: int, in_features: int) -> None:
        self.groups(in_features)

    def whole(self) -> Self:
        return replace(self, group_size=None)

    def fit(self, weight: Tensor) -> IntParams:
        """Scale and zero point of each group of `weight` (out, in): the extremes land on the outermost levels.

        Raises:
            ValueError: the weights are too large for scales in float16.
        """
        return self.spanning(*self.extremes(weight))

    def refit(self, weight: Tensor, params: IntParams) -> IntParams:
        return self.fit(weight)

    def extremes(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """What the levels of each group must reach: from, to, (out, groups)."""
        grouped = weight.float().unflatten(-1, (self.groups(weight.shape[-1]), -1))
        low, high = grouped.amin(-1), grouped.amax(-1)
        return (low, high) if self.float_zero else (low.clamp(max=0), high.clamp(min=0))

    def spanning(self, low: Tensor, high: Tensor) -> IntParams:
        """The parameters whose outermost levels are `low` and `high` (out, groups), or the larger of them both ways."""
        top = 2**self.bits - (2 if self.restricted else 1)
        if self.float_zero:
            # a zero point of float16 that lies further off is rounded by the width of the group, or infinite
            most = min(1024 * top, 2**15)
            far = (high > low) & (torch.maximum(low.abs(), high.abs()) * top > most * (high - low))
            low, high = torch.where(far, low.clamp(max=0), low), torch.where(far, high.clamp(min=0), high)
        span = 2 * torch.maximum(-low, high) if self.symmetric else high - low
        scale = _float16_from_above(span / top)
        if not scale.isfinite().all():
            raise ValueError(
                f"weights up to {float(span.max()):.3g} need scales beyond float16; divide them by a constant"
            )
        if self.float_zero:
            # the levels of a constant group are that constant's multiples
            scale = scale.where(scale > 0, low.abs().half())
            scale = scale.where(scale > 0, 1.0)
            return IntParams(scale, (-low / scale.float()).half())
        # in a group of zeros any scale will do, but encode divides by it
        scale = scale.where(scale > 0, 1.0)
        half = torch.full_like(scale, 2 ** (self.bits - 1))
        zero_point = half if self.symmetric else (-low / scale.float()).round().clamp(0, 2**self.bits - 1)
        return IntParams(scale, zero_point.to(torch.uint8))

    def encode(self, weight: Tensor, params: IntParams) -> Tensor:
        """Codes of the nearest levels (ties to even), uint8, in the shape of `weight` (out, in)."""
        scale, zero_point = (_of_weights(p, weight.shape[-1]) for p in params)
        steps = weight.float() / scale
        codes = (steps + zero_point).round() if self.float_zero else steps.round() + zero_point
        return codes.clamp(int(self.restricted), 2**self.bits - 1).to(torch.uint8)

    def decode(self, codes: Tensor, params: IntParams) -> Tensor:
        """Weights, float32, in the shape of `codes` (out, in): exact, a code and a float16 scale have 8 + 11 bits."""
        scale, zero_point = (_of_weights(p, codes.shape[-1]) for p in params)
        return (codes - zero_point) * scale

    def layout(self, out_features: int, in_features: int) -> dict[str, Buffer]:
        groups = self.groups(in_features)
        layout = {
            "codes": Buffer((out_features, -(-in_features // 8) * self.bits), torch.uint8),
            "scale_bits": Buffer((out_features, groups), torch.int16),
        }
        if self.float_zero:
            layout["zero_point_bits"] = Buffer((out_features, groups), torch.int16)
        elif not self.symmetric:
            layout["zero_points"] = Buffer((-(-out_features * groups // 8) * self.bits,), torch.uint8)
        return layout

    def pack(self, codes: Tensor, params: IntParams) -> dict[str, Tensor]:
        packed = {"codes": pack_bits(codes, self.bits), "scale_bits": bits_of(params.scale)}
        if self.float_zero:
            packed["zero_point_bits"] = bits_of(params.zero_point)
        elif not self.symmetric:
            packed["zero_points"] = pack_bits(params.zero_point.flatten(), self.bits)
        return packed

    def unpack(self, stored: Stored, shape: tuple[int, int]) -> tuple[Tensor, IntParams]:
        return unpack_bits(stored["codes"], self.bits, shape[1]), self._params(stored)

    def _params(self, stored: Stored) -> IntParams:
        scale = stored["scale_bits"].view(torch.float16)
        if self.float_zero:
            zero_point = stored["zero_point_bits"].view(torch.float16)
        elif self.symmetric:
            zero_point = torch.full_like(scale, 2 ** (self.bits - 1), dtype=torch.uint8)
        else:
            zero_point = unpack_bits(stored["zero_points"], self.bits, scale.numel()).view_as(scale)
        return IntParams(scale, zero_point)

    def prepare(self, stored: Stored, shape: tuple[int, int]) -> tuple[Any, ...]:
        """Unpacking the zero points costs as much as a small product."""
        params = self._params(stored)
        group_size = shape[1] // params.scale.shape[1]
        return stored["codes"], params.scale, params.zero_point.half(), self.bits, group_size

    def linear(self, x: Tensor, *prepared: Any) -> Tensor:
        return dequant_matmul(x, *prepared)

    @property
    def _is_int8(self) -> bool:
        """Whether all of a row is added up as integers."""
        return self.symmetric and self.group_size is None and self.bits in (4, 8)

    def prepare_integers(self, stored: Stored, shape: tuple[int, int]) -> tuple[Any, ...]:
        params = self._params(stored)
        if not self._is_int8:
            group_size = shape[1] // params.scale.shape[1]
            return stored["codes"], params.scale.float(), params.zero_point.float(), self.bits, group_size
        # code - 2^(bits - 1) in two's complement: the highest bit is turned over, at 4 bits in both halves of a byte
        codes = stored["codes"] ^ (0x88 if self.bits == 4 else 0x80)
        return (codes if self.bits == 4 else codes[:, : shape[1]].contiguous().view(torch.int8)), params.scale[:, 0]

    def integer_linear(self, x: Tensor, x_scale: Tensor, *prepared: Any) -> Tensor:
        if not self._is_int8:
            return wna8_linear(x, x_scale, *prepared)
        return (w4a8_linear if self.bits == 4 else w8a8_linear)(x, x_scale[..., 0], *prepared)


def _of_weights(p: Tensor, in_features: int) -> Tensor:
    """A parameter (out, groups) as float32 (out, in), or (out, 1) where a row is one group."""
    return p.float() if p.shape[1] == 1 else p.float().repeat_interleave(in_features // p.shape[1], -1)


def _float16_from_above(scale: Tensor) -> Tensor:
    """Smallest float16 that is not below `scale`, which is not negative."""
    half = scale.half()
    # float16 numbers that are not negative are in the order of their bits, read as integers
    return (half.view(torch.int16) + (half < scale)).view(torch.float16)
