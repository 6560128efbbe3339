"""One bit per weight: its sign."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tersor.quant.grid.codebook import CodebookGrid, as_float16
from tersor.quant.grid.protocol import Buffer, Stored, bits_of, check_group_size


class BinaryParams(NamedTuple):
    scale: Tensor  # (out, groups), float16
    mean: Tensor  # (out, groups), float16; zeros where the grid is not centred


@dataclass(frozen=True)
class BinaryGrid(CodebookGrid):
    """Levels mean +- scale, with scale = mean |w - mean|, the best one for given signs (arXiv:1603.05279, section 3.1).

    A weight at the mean is above it. Zero is no level.

    Args:
        group_size: input channels that share a scale, a float16; must divide the layer's `in`. None: the whole row.
        centred: store the mean of each group too, a float16; else it is zero. PTQ1.61 (arXiv:2502.13179) and others do.
    """

    group_size: int | None = 128
    centred: bool = False

    def __post_init__(self) -> None:
        check_group_size(self.group_size)

    @property
    def bits(self) -> int:
        return 1

    @property
    def codebook(self) -> tuple[float, ...]:
        return -1.0, 1.0

    def fit(self, weight: Tensor) -> BinaryParams:
        grouped = self.grouped(weight)
        mean = as_float16(grouped.mean(-1) if self.centred else torch.zeros_like(grouped[..., 0]))
        scale = as_float16((grouped - mean[..., None].float()).abs().mean(-1))
        # the mean is divided by the scale in products: where all weights are equal, it is the scale
        return BinaryParams(scale.where(scale > 0, mean.abs()), mean.where(scale > 0, 0.0))

    def nearest(self, steps: Tensor) -> Tensor:
        return (steps >= 0).to(torch.uint8)

    def encode(self, weight: Tensor, params: BinaryParams) -> Tensor:
        return super().encode((_grouped(weight, params) - params.mean[..., None].float()).flatten(-2), params)

    def decode(self, codes: Tensor, params: BinaryParams) -> Tensor:
        return (_grouped(super().decode(codes, params), params) + params.mean[..., None].float()).flatten(-2)

    def scale_layout(self, out_features: int, groups: int) -> dict[str, Buffer]:
        scale = super().scale_layout(out_features, groups)
        return scale | {"mean_bits": Buffer((out_features, groups), torch.int16)} if self.centred else scale

    def pack_scale(self, params: BinaryParams) -> dict[str, Tensor]:
        scale = super().pack_scale(params)
        return scale | {"mean_bits": bits_of(params.mean)} if self.centred else scale

    def unpack_scale(self, stored: Stored, shape: tuple[int, int]) -> BinaryParams:
        scale = stored["scale_bits"].view(torch.float16)
        return BinaryParams(scale, stored["mean_bits"].view(torch.float16) if self.centred else torch.zeros_like(scale))

    def prepare(self, stored: Stored, shape: tuple[int, int]) -> tuple[Any, ...]:
        prepared = super().prepare(stored, shape)
        if not self.centred:
            return prepared
        scale, mean = self.unpack_scale(stored, shape)
        return *prepared, (-mean.float() / scale.where(scale > 0, 1.0).float())


def _grouped(weight: Tensor, params: BinaryParams) -> Tensor:
    return weight.float().unflatten(-1, (params.scale.shape[1], -1))
