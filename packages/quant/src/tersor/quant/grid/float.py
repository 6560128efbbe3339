"""Small floating-point numbers, scaled per group, row, tensor or block."""

from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from tersor.quant.grid.codebook import CodebookGrid, ScaleParams, as_float16
from tersor.quant.grid.protocol import Buffer, Stored, bits_of


class FloatFormat(NamedTuple):
    """A sign, an exponent, a mantissa; below the smallest exponent numbers are evenly spaced."""

    exponent_bits: int
    mantissa_bits: int
    largest: float  # codes beyond stand for infinity and NaN, and are never used

    @property
    def bits(self) -> int:
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def smallest_exponent(self) -> int:
        """log2 of the smallest number with an implicit one."""
        return 2 - 2 ** (self.exponent_bits - 1)

    def encode(self, numbers: Tensor) -> Tensor:
        """Codes (uint8) of the nearest numbers, ties to even mantissas; beyond the largest number they are its codes."""
        magnitude = numbers.abs().clamp(max=self.largest)
        # exponents are read from, and powers of two written to, the bits of a float32: torch.exp2 may be off by an ulp
        exponent = (magnitude.clamp(min=2.0**self.smallest_exponent).view(torch.int32) >> 23) - 127
        steps = magnitude * ((127 + self.mantissa_bits - exponent) << 23).view(torch.float32)
        # a mantissa that is rounded up to 2 has the code of the next exponent's first
        code = ((exponent - self.smallest_exponent) << self.mantissa_bits) + steps.round().int()
        return (code + (numbers.signbit().int() << self.bits - 1)).to(torch.uint8)


FORMATS = {
    "e4m3": FloatFormat(4, 3, 448.0),
    "e5m2": FloatFormat(5, 2, 57344.0),
    "e2m1": FloatFormat(2, 1, 6.0),
    "e2m3": FloatFormat(2, 3, 7.5),
    "e3m2": FloatFormat(3, 2, 28.0),
}
E2M1, E4M3 = FORMATS["e2m1"], FORMATS["e4m3"]


@cache
def numbers(form: FloatFormat) -> tuple[float, ...]:
    """What the codes of a format stand for, in their order; NaN where they are not used."""
    found = []
    for code in range(2 ** (form.bits - 1)):
        field, mantissa = code >> form.mantissa_bits, code % 2**form.mantissa_bits
        steps = mantissa + 2**form.mantissa_bits if field else mantissa
        number = steps * 2.0 ** (max(field, 1) - 1 + form.smallest_exponent - form.mantissa_bits)
        found.append(number if number <= form.largest else float("nan"))
    return (*found, *(-number for number in found))


@dataclass(frozen=True)
class FloatGrid(CodebookGrid):
    """Levels of a floating-point format of 4, 6 or 8 bits, times a scale that puts max|w| on the largest one.

    Formats: e4m3 (the variant without infinities, whose largest number is 448) and e5m2 of arXiv:2209.05433; e2m1, e2m3
    and e3m2 of the OCP Microscaling Formats 1.0. Codes are the formats' own bits. Scales are stored with the 11 bits
    of a float16, and the range of one that multiplied levels below 2.

    Args:
        format: e and the bits of the exponent, m and the bits of the mantissa.
        group_size: input channels that share a scale; must divide the layer's `in`. None: the whole row.
        rows: output channels that share a scale; the last ones may be fewer. None: all, so that with
            `group_size=None` there is one scale per tensor. FP8 is also used in blocks of 128 x 128.
    """

    format: Literal["e4m3", "e5m2", "e2m1", "e2m3", "e3m2"] = "e4m3"
    group_size: int | None = None
    rows: int | None = 1

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {self.format!r}")
        for name in ("group_size", "rows"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be positive or None (all), got {value}")

    @property
    def bits(self) -> int:
        return FORMATS[self.format].bits

    @property
    def codebook(self) -> tuple[float, ...]:
        return numbers(FORMATS[self.format])

    @property
    def per_row(self) -> bool:
        return self.rows == 1

    def fit(self, weight: Tensor) -> ScaleParams:
        """Scales (ceil(out / rows), groups), float32.

        Raises:
            ValueError: the weights are too large for them.
        """
        absmax = self.grouped(weight).abs().amax(-1)
        rows = self.rows or len(absmax)
        shared = F.pad(absmax, (0, 0, 0, -len(absmax) % rows)).unflatten(0, (-1, rows)).amax(1)
        return ScaleParams(as_float16(shared / FORMATS[self.format].largest * self._unit).float() / self._unit)

    def refit(self, weight: Tensor, params: ScaleParams) -> ScaleParams:
        return self.fit(weight) if self.rows == 1 else params

    def nearest(self, steps: Tensor) -> Tensor:
        return FORMATS[self.format].encode(steps)

    @property
    def _unit(self) -> float:
        """What scales are multiplied by when they are stored: it divides the levels into numbers below 2."""
        return 2.0 ** (int(FORMATS[self.format].largest).bit_length() - 1)

    def scale(self, params: ScaleParams, out_features: int) -> Tensor:
        if self.rows == 1:
            return params.scale
        return params.scale.repeat_interleave(self.rows or out_features, 0)[:out_features]

    def scale_layout(self, out_features: int, groups: int) -> dict[str, Buffer]:
        return {"scale_bits": Buffer((-(-out_features // (self.rows or out_features)), groups), torch.int16)}

    def pack_scale(self, params: ScaleParams) -> dict[str, Tensor]:
        return {"scale_bits": bits_of((params.scale * self._unit).half())}

    def unpack_scale(self, stored: Stored, shape: tuple[int, int]) -> ScaleParams:
        return ScaleParams(stored["scale_bits"].view(torch.float16).float() / self._unit)
