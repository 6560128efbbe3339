"""Codebooks learnt from the weights themselves."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from tersor.kernels import lookup_linear, pack_bits, unpack_bits
from tersor.quant.grid.decoded import decoded_linear
from tersor.quant.grid.lloyd import kmeans
from tersor.quant.grid.protocol import Buffer, Stored, bits_of, check_group_size, groups


class KMeansParams(NamedTuple):
    codebook: Tensor  # (out, groups, 2^bits), or (1, 1, 2^bits) of the whole tensor; float16, ascending


@dataclass(frozen=True)
class KMeansGrid:
    """2^bits levels for each row, group or tensor, where k-means puts them; no scale.

    Source: the codebooks of arXiv:2309.00964 (one per tensor) and arXiv:2410.06364 (some per row). Each costs
    16 * 2^bits bits: at 4 bits and one per row of 1024, a quarter of a bit per weight.

    Args:
        bits: bits per code, 1 to 8.
        group_size: input channels that share a codebook; must divide the layer's `in`. None: the whole row.
        per_tensor: one codebook for all rows.
    """

    bits: int = 4
    group_size: int | None = None
    per_tensor: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError(f"bits must be 1 to 8, got {self.bits}")
        check_group_size(self.group_size)
        if self.per_tensor and self.group_size is not None:
            raise ValueError(f"a codebook per tensor is not one per group of {self.group_size}: use group_size=None")

    @property
    def per_row(self) -> bool:
        return not self.per_tensor

    def groups(self, in_features: int) -> int:
        return groups(in_features, self.group_size)

    def check(self, out_features: int, in_features: int) -> None:
        self.groups(in_features)

    def whole(self) -> Self:
        return replace(self, group_size=None)

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> KMeansParams:
        """Codebooks of least squared error.

        Args:
            importance: (in,), what the squared errors of each column are multiplied by: the diagonal of H, say.

        Raises:
            ValueError: a weight is beyond float16.
        """
        grouped = weight.float().unflatten(-1, (self.groups(weight.shape[-1]), -1))
        if importance is not None:
            importance = importance.expand_as(weight).reshape(grouped.shape)
        if self.per_tensor:
            grouped, importance = (
                grouped.reshape(1, 1, -1),
                None if importance is None else importance.reshape(1, 1, -1),
            )
        codebook = kmeans(grouped, 2**self.bits, importance).half()
        if not codebook.isfinite().all():
            raise ValueError(
                f"weights up to {float(weight.abs().max()):.3g} are beyond float16; divide them by a constant"
            )
        return KMeansParams(codebook)

    def refit(self, weight: Tensor, params: KMeansParams) -> KMeansParams:
        return params if self.per_tensor else self.fit(weight)

    def encode(self, weight: Tensor, params: KMeansParams) -> Tensor:
        """Codes of the nearest levels, of two the lower one, uint8, in the shape of `weight` (out, in)."""
        codebook = params.codebook.float()
        middles = (codebook[..., 1:] + codebook[..., :-1]) / 2
        if self.per_tensor:
            return torch.bucketize(weight.float(), middles.flatten(), out_int32=True).to(torch.uint8)
        grouped = weight.float().unflatten(-1, (codebook.shape[1], -1)).contiguous()
        return torch.searchsorted(middles, grouped, out_int32=True).to(torch.uint8).flatten(-2)

    def decode(self, codes: Tensor, params: KMeansParams) -> Tensor:
        return _levels(codes, params.codebook)

    def layout(self, out_features: int, in_features: int) -> dict[str, Buffer]:
        rows = 1 if self.per_tensor else out_features
        return {
            "codes": Buffer((out_features, -(-in_features // 8) * self.bits), torch.uint8),
            "codebook_bits": Buffer((rows, self.groups(in_features), 2**self.bits), torch.int16),
        }

    def pack(self, codes: Tensor, params: KMeansParams) -> dict[str, Tensor]:
        return {"codes": pack_bits(codes, self.bits), "codebook_bits": bits_of(params.codebook)}

    def unpack(self, stored: Stored, shape: tuple[int, int]) -> tuple[Tensor, KMeansParams]:
        codebook = stored["codebook_bits"].view(torch.float16)
        return unpack_bits(stored["codes"], self.bits, shape[1]), KMeansParams(codebook)

    def prepare(self, stored: Stored, shape: tuple[int, int]) -> tuple[Any, ...]:
        codebook = stored["codebook_bits"].view(torch.float16)
        return stored["codes"], codebook, codebook.new_ones(shape[0], 1)

    def linear(self, x: Tensor, *prepared: Any) -> Tensor:
        packed, codebook, scale = prepared
        if self.per_tensor:
            return lookup_linear(x, packed, codebook.flatten(), scale, self.bits, x.shape[-1])

        def decode(rows: slice) -> Tensor:
            codes = unpack_bits(packed[rows], self.bits, x.shape[-1])
            return _levels(codes, codebook[rows])

        return decoded_linear(x, decode, len(packed))


def _levels(codes: Tensor, codebook: Tensor) -> Tensor:
    """codebook[row, group, code], float32, in the shape of `codes` (rows, in)."""
    rows, groups, size = codebook.shape
    starts = torch.arange(0, codebook.numel(), size, device=codes.device, dtype=torch.int32).view(rows, groups, 1)
    index = codes.int().unflatten(-1, (groups, -1)) + starts
    # one index into all of them: on CPUs many times as fast as a gather
    return codebook.float().flatten().index_select(0, index.flatten()).view(codes.shape)
