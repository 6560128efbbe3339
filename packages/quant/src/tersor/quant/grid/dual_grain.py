"""Four bits in groups, whose scales are integers times one scale per row."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from tersor.kernels import dequant_matmul, pack_bits, unpack_bits, w4a8_linear
from tersor.quant.grid.protocol import Buffer, Stored, bits_of, check_group_size, groups


class DualGrainParams(NamedTuple):
    scale: Tensor  # (out, 1), float32: of the row
    step: Tensor  # (out, groups), uint8, 1 ... 127: of the group, in units of the row's scale
    zero_point: Tensor  # (out, groups), uint8, 0 ... 15


@dataclass(frozen=True)
class DualGrain:
    """Levels scale * step * (code - zero_point), code = 0 ... 15: step * (code - zero_point) are integers of 8 bits.

    So products with inputs of 8 bits are those of integers, and only whole rows are scaled (arXiv:2310.04836, DGQ, section
    3.2). Codes that would leave -127 ... 127 are not used: above a step of 16 there are fewer than 16 levels. Zero is one
    always.

    Args:
        group_size: input channels that share a step; must divide the layer's `in`. None: the whole row.
    """

    group_size: int | None = 128
    per_row = True

    def __post_init__(self) -> None:
        check_group_size(self.group_size)

    def groups(self, in_features: int) -> int:
        return groups(in_features, self.group_size)

    def check(self, out_features: int, in_features: int) -> None:
        self.groups(in_features)

    def whole(self) -> Self:
        return replace(self, group_size=None)

    def fit(self, weight: Tensor) -> DualGrainParams:
        """127 scales reach the largest weight of a row, 15 steps from min(w, 0) to max(w, 0) of a group."""
        scale = weight.float().abs().amax(-1, keepdim=True) / 127
        return self.spanning(*self.extremes(weight), scale)

    def refit(self, weight: Tensor, params: DualGrainParams) -> DualGrainParams:
        """The rows' scales stay."""
        return self.spanning(*self.extremes(weight), params.scale)

    def extremes(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """What the levels of each group must reach: from, to, (out, groups)."""
        grouped = weight.float().unflatten(-1, (self.groups(weight.shape[-1]), -1))
        return grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)

    def spanning(self, low: Tensor, high: Tensor, scale: Tensor) -> DualGrainParams:
        """The parameters, given the rows' scales (out, 1), whose levels go from about `low` to `high` (out, groups)."""
        # in a row of zeros any scale will do, but encode divides by it; subnormal ones have few bits
        scale = scale.float().where(scale > torch.finfo(torch.float32).tiny, 1.0)
        step = ((high - low) / 15 / scale).round().clamp(1, 127)
        # unlike the authors' code, which keeps that of the step before it was rounded
        zero_point = (-low / (scale * step)).round().clamp(0, 15)
        return DualGrainParams(scale, step.to(torch.uint8), zero_point.to(torch.uint8))

    def encode(self, weight: Tensor, params: DualGrainParams) -> Tensor:
        """Codes of the nearest levels (ties to even), uint8, in the shape of `weight` (out, in)."""
        step, zero_point = (p[..., None].float() for p in params[1:])
        steps = weight.float().unflatten(-1, (step.shape[1], -1)) / (params.scale[..., None] * step)
        furthest = (127 / step).floor()
        lowest, highest = (zero_point - furthest).clamp(min=0), (zero_point + furthest).clamp(max=15)
        return (steps.round() + zero_point).clamp(lowest, highest).to(torch.uint8).flatten(-2)

    def decode(self, codes: Tensor, params: DualGrainParams) -> Tensor:
        return self.integers(codes, params) * params.scale

    def integers(self, codes: Tensor, params: DualGrainParams) -> Tensor:
        """step * (code - zero_point), float32, -127 ... 127, in the shape of `codes` (out, in)."""
        step, zero_point = (p[..., None].float() for p in params[1:])
        return ((codes.unflatten(-1, (step.shape[1], -1)) - zero_point) * step).flatten(-2)

    def layout(self, out_features: int, in_features: int) -> dict[str, Buffer]:
        groups = self.groups(in_features)
        return {
            "codes": Buffer((out_features, -(-in_features // 8) * 4), torch.uint8),
            "scale_bits": Buffer((out_features, 1), torch.int32),
            "steps": Buffer((out_features, groups), torch.uint8),
            "zero_points": Buffer((-(-out_features * groups // 8) * 4,), torch.uint8),
        }

    def pack(self, codes: Tensor, params: DualGrainParams) -> dict[str, Tensor]:
        return {
            "codes": pack_bits(codes, 4),
            "scale_bits": bits_of(params.scale),
            "steps": params.step.contiguous(),
            "zero_points": pack_bits(params.zero_point.flatten(), 4),
        }

    def unpack(self, stored: Stored, shape: tuple[int, int]) -> tuple[Tensor, DualGrainParams]:
        return unpack_bits(stored["codes"], 4, shape[1]), self._params(stored)

    def _params(self, stored: Stored) -> DualGrainParams:
        step = stored["steps"]
        zero_point = unpack_bits(stored["zero_points"], 4, step.numel()).view_as(step)
        return DualGrainParams(stored["scale_bits"].view(torch.float32), step, zero_point)

    def prepare(self, stored: Stored, shape: tuple[int, int]) -> tuple[Any, ...]:
        scale, step, zero_point = self._params(stored)
        return stored["codes"], scale * step, zero_point.float(), 4, shape[1] // step.shape[1]

    def linear(self, x: Tensor, *prepared: Any) -> Tensor:
        return dequant_matmul(x, *prepared)

    def prepare_integers(self, stored: Stored, shape: tuple[int, int]) -> tuple[Any, ...]:
        scale, step, zero_point = self._params(stored)
        # code - 8 in two's complement: the highest bit of each half of a byte is turned over
        return stored["codes"] ^ 0x88, scale[:, 0], step.view(torch.int8), zero_point.view(torch.int8) - 8

    def integer_linear(self, x: Tensor, x_scale: Tensor, *prepared: Any) -> Tensor:
        return w4a8_linear(x, x_scale[..., 0], *prepared)
