"""Four-bit floats in small blocks whose scales are small floats too: MXFP4 and NVFP4."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from tersor.quant.grid.codebook import CodebookGrid, ScaleParams
from tersor.quant.grid.float import E2M1, E4M3, numbers
from tersor.quant.grid.protocol import Buffer, Stored, bits_of, check_group_size


@dataclass(frozen=True)
class MXFP4Grid(CodebookGrid):
    """Levels of e2m1 times a power of two per block, of 8 bits: 4.25 bits per weight.

    Source: OCP Microscaling Formats 1.0, section 6.3. Unlike there, the powers begin at 2^-126.

    Args:
        rule: for scales. "floor": 2^floor(log2 max|w|) / 4, as the specification suggests: a block whose max|w| is 1.5
            times a power of two and more saturates. "even": the power above where max|w| is rounded up to it by the
            one bit of mantissa of e2m1, that is from 1.75 times a power of two on.
        group_size: input channels that share a scale; must divide the layer's `in`. The format has 32.
    """

    rule: Literal["even", "floor"] = "even"
    group_size: int | None = 32

    def __post_init__(self) -> None:
        if self.rule not in ("even", "floor"):
            raise ValueError(f'rule must be "even" or "floor", got {self.rule!r}')
        check_group_size(self.group_size)

    @property
    def bits(self) -> int:
        return E2M1.bits

    @property
    def codebook(self) -> tuple[float, ...]:
        return numbers(E2M1)

    def fit(self, weight: Tensor) -> ScaleParams:
        """Scales (out, groups), float32."""
        absmax_bits = self.grouped(weight).abs().amax(-1).contiguous().view(torch.int32)
        if self.rule == "even":
            # a quarter of the mantissa's range: carries from 1.75 on
            absmax_bits = absmax_bits + (1 << 21)
        # 2: log2 of the power of two in the largest level, 1.5 * 2^2
        return ScaleParams(_power((absmax_bits >> 23) - 2))

    def nearest(self, steps: Tensor) -> Tensor:
        return E2M1.encode(steps)

    def scale_layout(self, out_features: int, groups: int) -> dict[str, Buffer]:
        return {"scale_exponents": Buffer((out_features, groups), torch.uint8)}

    def pack_scale(self, params: ScaleParams) -> dict[str, Tensor]:
        return {"scale_exponents": (params.scale.view(torch.int32) >> 23).to(torch.uint8)}

    def unpack_scale(self, stored: Stored, shape: tuple[int, int]) -> ScaleParams:
        return ScaleParams(_power(stored["scale_exponents"].int()))


def _power(biased_exponent: Tensor) -> Tensor:
    """2^(biased_exponent - 127), float32, exact."""
    return (biased_exponent.clamp(1, 254) << 23).view(torch.float32)


class NVFP4Params(NamedTuple):
    block_scale: Tensor  # (out, groups): numbers of e4m3, in float32
    global_scale: Tensor  # (1, 1), float32: divides them


@dataclass(frozen=True)
class NVFP4Grid(CodebookGrid):
    """Levels of e2m1 times a number of e4m3 per block, over one number per tensor: 4.5 bits per weight.

    G = 448 * 6 / max|W|; the scale of a block is e4m3(G max|w| / 6) / G. So the largest block's is 448 / G, and blocks
    with less than 2^-19 of its magnitude become zero. Source: arXiv:2509.25149, whose global scale is 1 / G.

    Args:
        group_size: input channels that share a scale; must divide the layer's `in`. The format has 16.
    """

    group_size: int | None = 16

    def __post_init__(self) -> None:
        check_group_size(self.group_size)

    @property
    def bits(self) -> int:
        return E2M1.bits

    @property
    def codebook(self) -> tuple[float, ...]:
        return numbers(E2M1)

    @property
    def per_row(self) -> bool:
        return False

    def fit(self, weight: Tensor) -> NVFP4Params:
        absmax = weight.float().abs().amax()
        global_scale = (E4M3.largest * E2M1.largest / absmax).where(absmax > 0, 1.0)
        return self._fit_blocks(weight, global_scale.view(1, 1))

    def refit(self, weight: Tensor, params: NVFP4Params) -> NVFP4Params:
        return self._fit_blocks(weight, params.global_scale)

    def _fit_blocks(self, weight: Tensor, global_scale: Tensor) -> NVFP4Params:
        absmax = self.grouped(weight).abs().amax(-1)
        code = E4M3.encode(absmax * global_scale / E2M1.largest)
        return NVFP4Params(torch.tensor(numbers(E4M3), device=code.device)[code.int()], global_scale)

    def nearest(self, steps: Tensor) -> Tensor:
        return E2M1.encode(steps)

    def scale(self, params: NVFP4Params, out_features: int) -> Tensor:
        return params.block_scale / params.global_scale

    def scale_layout(self, out_features: int, groups: int) -> dict[str, Buffer]:
        blocks = Buffer((out_features, groups), torch.uint8)
        return {"block_scale_codes": blocks, "global_scale_bits": Buffer((1,), torch.int32)}

    def pack_scale(self, params: NVFP4Params) -> dict[str, Tensor]:
        codes = E4M3.encode(params.block_scale)
        return {"block_scale_codes": codes, "global_scale_bits": bits_of(params.global_scale.flatten())}

    def unpack_scale(self, stored: Stored, shape: tuple[int, int]) -> NVFP4Params:
        codes = stored["block_scale_codes"]
        block_scale = torch.tensor(numbers(E4M3), device=codes.device)[codes.int()]
        return NVFP4Params(block_scale, stored["global_scale_bits"].view(torch.float32).view(1, 1))
