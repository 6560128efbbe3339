"""Evenly spaced levels whose scales and zero points are quantised in turn."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from tersor.kernels import dequant_matmul, pack_bits, unpack_bits
from tersor.quant.grid.protocol import Buffer, Stored, bits_of, check_group_size, groups


class BilevelParams(NamedTuple):
    """The scale of a group is scale_low + scale_code * scale_step; zero points likewise."""

    scale_code: Tensor  # (out, groups), uint8
    scale_step: Tensor  # (out / stat_group, groups), float16
    scale_low: Tensor
    zero_code: Tensor
    zero_step: Tensor
    zero_low: Tensor


@dataclass(frozen=True)
class BilevelInt:
    """Levels (code - zero_point) * scale, both of them quantised over `stat_group` rows (arXiv:2306.03078, section 3.2).

    So groups can be small: 3 bits in groups of 16 take 3.625 bits per weight. What a zero point is rounded to need not be
    a level, so zero need not be one.

    Args:
        bits: bits per code, 1 to 8.
        group_size: input channels that share a scale; must divide the layer's `in`. None: the whole row.
        stat_bits: bits per scale and per zero point.
        stat_group: consecutive rows whose scales share a range; must divide the layer's `out`.
    """

    bits: int = 3
    group_size: int | None = 16
    stat_bits: int = 3
    stat_group: int = 16
    per_row = False

    def __post_init__(self) -> None:
        for name, bits in (("bits", self.bits), ("stat_bits", self.stat_bits)):
            if not 1 <= bits <= 8:
                raise ValueError(f"{name} must be 1 to 8, got {bits}")
        check_group_size(self.group_size)
        if self.stat_group < 1:
            raise ValueError(f"stat_group must be positive, got {self.stat_group}")

    def groups(self, in_features: int) -> int:
        return groups(in_features, self.group_size)

    def check(self, out_features: int, in_features: int) -> None:
        self.groups(in_features)
        if out_features % self.stat_group:
            way_out = next(n for n in range(self.stat_group, 0, -1) if out_features % n == 0)
            raise ValueError(
                f"out = {out_features} is not a multiple of stat_group = {self.stat_group}; use stat_group = {way_out}"
            )

    def whole(self) -> Self:
        return replace(self, group_size=None)

    def fit(self, weight: Tensor) -> BilevelParams:
        """Scales and zero points whose outermost levels are the extremes of each group, then rounded.

        Raises:
            ValueError: the weights are too large for float16.
        """
        self.check(*weight.shape)
        grouped = weight.float().unflatten(-1, (self.groups(weight.shape[-1]), -1))
        low, high = grouped.amin(-1), grouped.amax(-1)
        scale = (high - low) / (2**self.bits - 1)
        # the levels of a constant group are that constant's multiples
        scale = scale.where(scale > 0, low.abs())
        params = BilevelParams(*self._fit_statistic(scale), *self._fit_statistic(-low / scale.where(scale > 0, 1.0)))
        if not all(p.isfinite().all() for p in params):
            raise ValueError(
                f"weights up to {float(weight.abs().max()):.3g} need scales or zero points beyond float16; "
                "divide them by a constant, or use IntGrid"
            )
        return params

    def refit(self, weight: Tensor, params: BilevelParams) -> BilevelParams:
        """Anew: nothing is shared among groups, and of a group all rows are there."""
        return self.fit(weight)

    def _fit_statistic(self, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes, step and lowest value of `values` (out, groups)."""
        blocks = values.unflatten(0, (-1, self.stat_group))
        low = blocks.amin(1).half()
        step = ((blocks.amax(1) - low.float()) / (2**self.stat_bits - 1)).clamp(min=0).half()
        codes = ((blocks - low[:, None].float()) / step.where(step > 0, 1.0)[:, None].float()).round()
        return codes.clamp(0, 2**self.stat_bits - 1).to(torch.uint8).flatten(0, 1), step, low

    def scale_and_zero(self, params: BilevelParams) -> tuple[Tensor, Tensor]:
        """Of each group, (out, groups), float32. A scale is 0 in groups of zeros, and in those far smaller than the others of
        their block.
        """
        scale_code, scale_step, scale_low, zero_code, zero_step, zero_low = params
        return _statistic(scale_code, scale_step, scale_low), _statistic(zero_code, zero_step, zero_low)

    def encode(self, weight: Tensor, params: BilevelParams) -> Tensor:
        scale, zero_point = (p[..., None] for p in self.scale_and_zero(params))
        steps = weight.float().unflatten(-1, (scale.shape[1], -1)) / scale.where(scale > 0, 1.0)
        return (steps + zero_point).round().clamp(0, 2**self.bits - 1).to(torch.uint8).flatten(-2)

    def decode(self, codes: Tensor, params: BilevelParams) -> Tensor:
        scale, zero_point = (p[..., None] for p in self.scale_and_zero(params))
        return ((codes.unflatten(-1, (scale.shape[1], -1)) - zero_point) * scale).flatten(-2)

    def layout(self, out_features: int, in_features: int) -> dict[str, Buffer]:
        groups = self.groups(in_features)
        codes = Buffer((-(-out_features * groups // 8) * self.stat_bits,), torch.uint8)
        block = Buffer((out_features // self.stat_group, groups), torch.int16)
        layout = {"codes": Buffer((out_features, -(-in_features // 8) * self.bits), torch.uint8)}
        for statistic in ("scale", "zero"):
            layout |= {f"{statistic}_codes": codes, f"{statistic}_step_bits": block, f"{statistic}_low_bits": block}
        return layout

    def pack(self, codes: Tensor, params: BilevelParams) -> dict[str, Tensor]:
        return {
            "codes": pack_bits(codes, self.bits),
            "scale_codes": pack_bits(params.scale_code.flatten(), self.stat_bits),
            "scale_step_bits": bits_of(params.scale_step),
            "scale_low_bits": bits_of(params.scale_low),
            "zero_codes": pack_bits(params.zero_code.flatten(), self.stat_bits),
            "zero_step_bits": bits_of(params.zero_step),
            "zero_low_bits": bits_of(params.zero_low),
        }

    def unpack(self, stored: Stored, shape: tuple[int, int]) -> tuple[Tensor, BilevelParams]:
        return unpack_bits(stored["codes"], self.bits, shape[1]), self._params(stored, shape)

    def _params(self, stored: Stored, shape: tuple[int, int]) -> BilevelParams:
        size = shape[0], self.groups(shape[1])
        scale_code, zero_code = (
            unpack_bits(stored[name], self.stat_bits, size[0] * size[1]).view(size)
            for name in ("scale_codes", "zero_codes")
        )
        scale_step, scale_low, zero_step, zero_low = (
            stored[f"{name}_bits"].view(torch.float16) for name in ("scale_step", "scale_low", "zero_step", "zero_low")
        )
        return BilevelParams(scale_code, scale_step, scale_low, zero_code, zero_step, zero_low)

    def prepare(self, stored: Stored, shape: tuple[int, int]) -> tuple[Any, ...]:
        scale, zero_point = self.scale_and_zero(self._params(stored, shape))
        return stored["codes"], scale, zero_point, self.bits, shape[1] // scale.shape[1]

    def linear(self, x: Tensor, *prepared: Any) -> Tensor:
        return dequant_matmul(x, *prepared)


def _statistic(codes: Tensor, step: Tensor, low: Tensor) -> Tensor:
    blocks = codes.unflatten(0, (len(step), -1))
    return (blocks * step[:, None].float() + low[:, None].float()).flatten(0, 1)
