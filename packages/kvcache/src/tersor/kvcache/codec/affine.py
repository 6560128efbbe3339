"""Integer codes with a scale and a minimum per group: x = minimum + code * scale, code = 0 ... 2^bits - 1."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from tersor.kernels import pack_bits, unpack_bits


class AffineCodes(NamedTuple):
    packed: Tensor  # (batch, heads, seq, ceil(head_dim / 8) * bits), uint8: a token is a row whatever the groups are
    scale: (
        Tensor  # PerChannel: (batch, heads, ceil(seq / group), 1, head_dim); PerToken: (batch, heads, seq, groups, 1)
    )
    minimum: Tensor  # as scale


@dataclass(frozen=True)
class Affine:
    """Codecs whose codes are `AffineCodes`, which attention can read as they are."""

    bits: int = 4
    group_size: int = 32

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError(f"bits must be 1 to 8, got {self.bits}")
        if self.group_size < 1:
            raise ValueError(f"group_size must be 1 or more, got {self.group_size}")

    @property
    def lossless(self) -> bool:
        return False


@dataclass(frozen=True)
class PerChannel(Affine):
    """Each channel is quantised over `group_size` consecutive tokens. For keys: their outliers sit in fixed channels.

    Source: arXiv:2402.02750, section 3.2. Scale and minimum are stored in 16 bits: in the dtype of the model if it has
    16 bits, as float16 otherwise, and codes are fitted to them after rounding, which adds at most
    2^-11 (|minimum| + 2^bits * scale) in float16 to the error of half a step. A constant group has scale 1.

    The cache does not know which tokens are padding. A group that holds the last padded and the first true tokens
    of a left-padded row takes its range from both; no other group is touched.

    Args:
        bits: bits per code, 1 to 8.
        group_size: consecutive tokens that share a scale in each channel.
    """

    @property
    def token_group(self) -> int:
        return self.group_size

    @property
    def channel_group(self) -> int:
        return 1

    def encode(self, x: Tensor) -> AffineCodes:
        groups = x.unflatten(2, (-1, self.group_size))  # (batch, heads, groups, group_size, head_dim)
        codes, scale, minimum = _quantise(groups, 3, self.bits)
        return AffineCodes(pack_bits(codes.flatten(2, 3), self.bits), scale, minimum)

    def decode(self, codes: AffineCodes, dtype: torch.dtype) -> Tensor:
        seq_len = codes.packed.shape[2]
        q = unpack_bits(codes.packed, self.bits, codes.scale.shape[-1])
        q = pad(q, (0, 0, 0, -seq_len % self.group_size)).unflatten(2, (-1, self.group_size))
        return _dequantise(q, codes, dtype).flatten(2, 3)[:, :, :seq_len]

    def part(self, codes: AffineCodes, start: int, stop: int) -> AffineCodes:
        first, last = start // self.group_size, -(-stop // self.group_size)
        return AffineCodes(
            codes.packed[:, :, start:stop], codes.scale[:, :, first:last], codes.minimum[:, :, first:last]
        )


@dataclass(frozen=True)
class PerToken(Affine):
    """Each token is quantised over groups of `group_size` channels. For values: errors stay within the token.

    Source: arXiv:2402.02750, section 3.2; rounding of scale and minimum as in `PerChannel`.

    Args:
        bits: bits per code, 1 to 8.
        group_size: neighbouring channels that share a scale; must divide head_dim.
    """

    @property
    def token_group(self) -> int:
        return 1

    @property
    def channel_group(self) -> int:
        return self.group_size

    def encode(self, x: Tensor) -> AffineCodes:
        groups = x.unflatten(-1, (-1, self.group_size))  # (batch, heads, seq, groups, group_size)
        codes, scale, minimum = _quantise(groups, 4, self.bits)
        return AffineCodes(pack_bits(codes.flatten(3), self.bits), scale, minimum)

    def decode(self, codes: AffineCodes, dtype: torch.dtype) -> Tensor:
        q = unpack_bits(codes.packed, self.bits, codes.scale.shape[3] * self.group_size)
        return _dequantise(q.unflatten(-1, (-1, self.group_size)), codes, dtype).flatten(3)

    def part(self, codes: AffineCodes, start: int, stop: int) -> AffineCodes:
        return AffineCodes(*(t[:, :, start:stop] for t in codes))


def _quantise(x: Tensor, dim: int, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes in the shape of `x`, scale and minimum of each group along `dim`."""
    dtype = x.dtype if x.dtype.itemsize == 2 else torch.float16
    x = x.float()
    minimum, maximum = x.aminmax(dim=dim, keepdim=True)
    scale = ((maximum - minimum) / (2**bits - 1)).to(dtype)
    minimum = minimum.to(dtype)
    # a group of one value, or of values closer than float16 can tell
    scale = scale.where(scale > 0, 1.0)
    codes = ((x - minimum) / scale).round_().clamp_(0, 2**bits - 1).to(torch.uint8)
    return codes, scale, minimum


def _dequantise(q: Tensor, codes: AffineCodes, dtype: torch.dtype) -> Tensor:
    # in float32: a bfloat16 product would lose about half a step at 8 bits
    return q.float().mul_(codes.scale).add_(codes.minimum).to(dtype)
