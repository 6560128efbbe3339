"""Grids of least squared error for normally distributed weights, as a Hadamard transform makes them."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tersor.kernels import pack_bits, unpack_bits, vector_codebook_linear
from tersor.quant.grid.codebook import CodebookGrid, ScaleParams, as_float16
from tersor.quant.grid.lloyd import normal_levels
from tersor.quant.grid.protocol import Buffer, Stored, bits_of, check_group_size, groups

TABLES = Path(__file__).with_name("gaussian_tables.safetensors")
# pairs whose nearest entry is looked for at once: 16 MiB of products with 256 entries
_BLOCK_PAIRS = 2**14


@dataclass(frozen=True)
class GaussianGrid(CodebookGrid):
    """The n levels of least squared error for N(0, 1), times |w| / sqrt(group_size): HIGGS with p = 1.

    Source: arXiv:2411.17525, section 4. Weights are taken as they are; the transform that makes them normal is another
    axis. Zero is no level.

    Args:
        n: levels, 2^bits, 2 to 256.
        group_size: input channels that share a scale, a float16; must divide the layer's `in`. None: the whole row.
    """

    n: int = 16
    group_size: int | None = 128

    def __post_init__(self) -> None:
        _check_settings(self.n, self.group_size, (2, 4, 8, 16, 32, 64, 128, 256))

    @property
    def bits(self) -> int:
        return self.n.bit_length() - 1

    @property
    def codebook(self) -> tuple[float, ...]:
        return normal_levels(self.n)

    def fit(self, weight: Tensor) -> ScaleParams:
        return ScaleParams(_root_mean_square(self.grouped(weight)))


@dataclass(frozen=True)
class GaussianPairGrid:
    """The n points of the plane of least squared error for N(0, 1)^2, times |w| / sqrt(group_size): HIGGS with p = 2.

    A code stands for two neighbours in a row, so that a weight takes log2(n) / 2 bits. Otherwise as `GaussianGrid`.

    Args:
        n: points, 2^bits, 16 to 256.
        group_size: input channels that share a scale, a float16; even, and must divide the layer's `in`.
    """

    n: int = 256
    group_size: int | None = 128
    per_row = True

    def __post_init__(self) -> None:
        _check_settings(self.n, self.group_size, (16, 32, 64, 128, 256))
        if self.group_size is not None and self.group_size % 2:
            raise ValueError(f"group_size must be even, as a code stands for two weights, got {self.group_size}")

    @property
    def bits(self) -> int:
        """Of a code."""
        return self.n.bit_length() - 1

    def groups(self, in_features: int) -> int:
        if in_features % 2:
            raise ValueError(f"in = {in_features} is odd, but a code stands for two weights; use GaussianGrid")
        return groups(in_features, self.group_size)

    def check(self, out_features: int, in_features: int) -> None:
        self.groups(in_features)

    def fit(self, weight: Tensor) -> ScaleParams:
        return ScaleParams(_root_mean_square(weight.float().unflatten(-1, (self.groups(weight.shape[-1]), -1))))

    def encode(self, weight: Tensor, params: ScaleParams) -> Tensor:
        """Codes (out, in / 2), uint8."""
        scale = params.scale.float()
        steps = weight.float().unflatten(-1, (scale.shape[1], -1)) / scale.where(scale > 0, 1.0)[..., None]
        points = self._points(weight.device)
        half_norms = points.square().sum(-1) / 2
        pairs = steps.reshape(-1, 2).split(_BLOCK_PAIRS)
        codes = [(block @ points.T - half_norms).argmax(-1).to(torch.uint8) for block in pairs]
        return torch.cat(codes).view(len(weight), -1)

    def decode(self, codes: Tensor, params: ScaleParams) -> Tensor:
        points = self._points(codes.device).index_select(0, codes.flatten().int())
        return (points.view(*params.scale.shape, -1) * params.scale[..., None].float()).flatten(-2)

    def layout(self, out_features: int, in_features: int) -> dict[str, Buffer]:
        return {
            "codes": Buffer((out_features, -(-in_features // 16) * self.bits), torch.uint8),
            "scale_bits": Buffer((out_features, self.groups(in_features)), torch.int16),
        }

    def pack(self, codes: Tensor, params: ScaleParams) -> dict[str, Tensor]:
        return {"codes": pack_bits(codes, self.bits), "scale_bits": bits_of(params.scale)}

    def unpack(self, stored: Stored, shape: tuple[int, int]) -> tuple[Tensor, ScaleParams]:
        codes = unpack_bits(stored["codes"], self.bits, shape[1] // 2)
        return codes, ScaleParams(stored["scale_bits"].view(torch.float16))

    def prepare(self, stored: Stored, shape: tuple[int, int]) -> tuple[Any, ...]:
        """The kernel has one scale per row, so groups are multiplied one after the other: codes (groups, out, ..., 1)."""
        codes, (scale,) = self.unpack(stored, shape)
        codes = codes.unflatten(-1, (scale.shape[1], -1)).transpose(0, 1).contiguous()
        return codes[..., None], self._points(codes.device)[None], scale.T.contiguous()

    def linear(self, x: Tensor, *prepared: Any) -> Tensor:
        codes, codebooks, scale = prepared
        wide = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (len(scale), -1))
        parts = (
            vector_codebook_linear(wide[..., g, :].contiguous(), codes[g], codebooks, scale[g])
            for g in range(len(scale))
        )
        return torch.as_tensor(sum(parts)).to(x.dtype)

    def _points(self, device: torch.device) -> Tensor:
        return torch.tensor(normal_points(self.n), device=device)


@cache
def normal_points(n: int) -> tuple[tuple[float, float], ...]:
    """The n points of least squared error for N(0, 1)^2, as `gaussian_tables.py` computed them."""
    return tuple((x, y) for x, y in load_file(TABLES)[str(n)].tolist())


def _root_mean_square(grouped: Tensor) -> Tensor:
    return as_float16(grouped.double().square().mean(-1).sqrt())


def _check_settings(n: int, group_size: int | None, offered: tuple[int, ...]) -> None:
    if n not in offered:
        raise ValueError(f"n must be one of {', '.join(map(str, offered))}, got {n}")
    check_group_size(group_size)
