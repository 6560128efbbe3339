"""Tokens as they are."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Plain(NamedTuple):
    x: Tensor  # (batch, heads, seq, head_dim)


@dataclass(frozen=True)
class FullPrecision:
    """decode(encode(x)) = x: the baseline, and the other half of a recipe that compresses only keys or only values."""

    @property
    def token_group(self) -> int:
        return 1

    @property
    def channel_group(self) -> int:
        return 1

    @property
    def lossless(self) -> bool:
        return True

    def encode(self, x: Tensor) -> Plain:
        return Plain(x)

    def decode(self, codes: Plain, dtype: torch.dtype) -> Tensor:
        return codes.x.to(dtype)

    def part(self, codes: Plain, start: int, stop: int) -> Plain:
        return Plain(codes.x[:, :, start:stop])
