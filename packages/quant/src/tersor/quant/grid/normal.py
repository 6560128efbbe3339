"""NF4: sixteen levels for normally distributed weights."""

from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from tersor.quant.grid.codebook import CodebookGrid, ScaleParams, as_float16
from tersor.quant.grid.protocol import Buffer, Stored, bits_of, check_group_size

# arXiv:2305.14314, appendix E
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


@dataclass(frozen=True)
class NormalFloatGrid(CodebookGrid):
    """Levels of NF4, quantiles of a normal distribution with zero among them, times max|w| (arXiv:2305.14314, section 3).

    Args:
        group_size: input channels that share a scale, a float16; must divide the layer's `in`. None: the whole row.
    """

    group_size: int | None = 64

    def __post_init__(self) -> None:
        check_group_size(self.group_size)

    @property
    def bits(self) -> int:
        return 4

    @property
    def codebook(self) -> tuple[float, ...]:
        return NF4

    def fit(self, weight: Tensor) -> Any:
        return ScaleParams(as_float16(self.grouped(weight).abs().amax(-1)))


class DoubleParams(NamedTuple):
    code: Tensor  # (out, groups), uint8: of the scale less their mean, among the dynamic numbers
    spread: Tensor  # (out, groups), float32: what these are multiplied by; equal in each run of `scales_per_spread`
    mean: Tensor  # (1, 1), float32


@dataclass(frozen=True)
class DoubleNormalFloatGrid(NormalFloatGrid):
    """`NormalFloatGrid` whose scales are quantised once more: 4.127 bits per weight (arXiv:2305.14314, section 3).

    As in the authors' library, scales less their mean become dynamic numbers of 8 bits (arXiv:2110.02861)
    times the largest magnitude of a run of them, row after row.

    Args:
        scales_per_spread: length of these runs.
    """

    scales_per_spread: int = 256

    @property
    def per_row(self) -> bool:
        return False

    def fit(self, weight: Tensor) -> DoubleParams:
        absmax = self.grouped(weight).abs().amax(-1)
        mean = absmax.mean().view(1, 1)
        runs = F.pad((absmax - mean).flatten(), (0, -absmax.numel() % self.scales_per_spread))
        largest = runs.view(-1, self.scales_per_spread).abs().amax(-1)
        return self._fit_scales(absmax, self._spread(largest, absmax.shape), mean)

    def refit(self, weight: Tensor, params: DoubleParams) -> DoubleParams:
        return self._fit_scales(self.grouped(weight).abs().amax(-1), params.spread, params.mean)

    def _fit_scales(self, absmax: Tensor, spread: Tensor, mean: Tensor) -> DoubleParams:
        levels = torch.tensor(dynamic_numbers(), device=absmax.device)
        parts = (absmax - mean) / spread.where(spread > 0, 1.0)
        code = torch.bucketize(parts, (levels[1:] + levels[:-1]) / 2, out_int32=True).to(torch.uint8)
        return DoubleParams(code, spread, mean)

    def _spread(self, largest: Tensor, shape: torch.Size) -> Tensor:
        return largest.repeat_interleave(self.scales_per_spread)[: shape.numel()].view(shape)

    def scale(self, params: DoubleParams, out_features: int) -> Tensor:
        levels = torch.tensor(dynamic_numbers(), device=params.code.device)
        return levels[params.code.int()] * params.spread + params.mean

    def scale_layout(self, out_features: int, groups: int) -> dict[str, Buffer]:
        return {
            "scale_codes": Buffer((out_features, groups), torch.uint8),
            "scale_spread_bits": Buffer((-(-out_features * groups // self.scales_per_spread),), torch.int32),
            "scale_mean_bits": Buffer((1,), torch.int32),
        }

    def pack_scale(self, params: DoubleParams) -> dict[str, Tensor]:
        return {
            "scale_codes": params.code,
            "scale_spread_bits": bits_of(params.spread.flatten()[:: self.scales_per_spread]),
            "scale_mean_bits": bits_of(params.mean.flatten()),
        }

    def unpack_scale(self, stored: Stored, shape: tuple[int, int]) -> DoubleParams:
        code = stored["scale_codes"]
        spread = self._spread(stored["scale_spread_bits"].view(torch.float32), code.shape)
        return DoubleParams(code, spread, stored["scale_mean_bits"].view(torch.float32).view(1, 1))


@cache
def dynamic_numbers() -> tuple[float, ...]:
    """256 numbers from -0.993 to 1: in the decade up to 10^-k the middles of 2^(6 - k) equal parts, k = 0 ... 6."""
    positive = []
    for k in range(7):
        step = 0.9 / 2 ** (6 - k)
        positive += [(0.1 + (i + 0.5) * step) / 10**k for i in range(2 ** (6 - k))]
    return tuple(sorted([0.0, 1.0, *positive, *(-number for number in positive)]))
