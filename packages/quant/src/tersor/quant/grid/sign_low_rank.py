"""Signs times low-rank magnitudes, block upon block: BitStack."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tersor.kernels import pack_bits, unpack_bits
from tersor.quant.grid.codebook import as_float16
from tersor.quant.grid.decoded import decoded_linear
from tersor.quant.grid.protocol import Buffer, Stored, bits_of

# of the randomised SVD: vectors beyond the rank, and passes
_OVERSAMPLING, _PASSES = 8, 4


class SignLowRankParams(NamedTuple):
    up: Tensor  # (blocks, out, rank), float16
    down: Tensor  # (blocks, rank, in), float16


@dataclass(frozen=True)
class SignLowRankStack:
    """W^ = sum_i S_i * (up_i down_i), S_i = +-1 and * element by element (BitStack, arXiv:2410.23918, section 3).

    Each block takes the sign of what those before it left, R, and the rank-`rank` matrix nearest to |R|. So the first n
    blocks are what `blocks=n` would have stored: blocks may be left out from the end at any time. One costs
    1 + 16 rank (out + in) / (out in) bits, which is 2 for rank 16 in a layer of 512 x 512 (rather take 4 to 8 there).

    Unlike the authors' code, where up_i down_i is negative the sign is the other one, so that no level is nearer; and what
    rounding to float16 does to a block is left to the next. The SVD is a randomised one (arXiv:0909.4061), with seeds of
    its own: for normal weights it leaves 1 % more of the squared error than the exact one at most.

    Products decode a megabyte of the weight at a time, which takes as long as the product with `blocks * rank` rows, and
    more for the signs: memory holds what is stored and no more, as that is what the budget of a stack is spent on.

    Args:
        blocks: of the stack, 1 or more.
        rank: of each block's magnitudes; at most the smaller side of the weight.
    """

    blocks: int = 16
    rank: int = 16
    per_row = False

    def __post_init__(self) -> None:
        if self.blocks < 1 or self.rank < 1:
            raise ValueError(f"blocks and rank must be positive, got {self.blocks} and {self.rank}")

    def check(self, out_features: int, in_features: int) -> None:
        if self.rank > min(out_features, in_features):
            raise ValueError(
                f"rank = {self.rank} is beyond that of a weight ({out_features}, {in_features}); "
                f"use at most {min(out_features, in_features)}"
            )

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> SignLowRankParams:
        """Magnitudes of least squared error, block by block.

        Args:
            importance: (in,), what the squared errors of each column are multiplied by: s^2 of the paper, which scales W by
                s before and the input by 1 / s at run time. Here 1 / s is multiplied into `down`, as a scale of columns
                goes through the product with the signs: so any linear will do, whatever its input comes from.

        Raises:
            ValueError: weights are beyond float16.
        """
        left, factors = weight.float(), []
        scale = torch.ones_like(left[0]) if importance is None else importance.float().sqrt()
        # the paper adds 1e-3 to norms over some 2048 tokens; relative to the mean, the unit of the input does not matter
        scale = scale / scale.mean().clamp(min=torch.finfo(scale.dtype).tiny) + 1e-3
        for _ in range(self.blocks):
            up, down = _low_rank(left.abs() * scale, self.rank)
            down = down / scale
            # float16 has few small numbers: both factors get the square root of their product's size
            size = down.norm(dim=1).sqrt()
            factors.append((as_float16(up * size), as_float16(down / size.where(size > 0, 1.0)[:, None])))
            left = _rest(left, _product(*factors[-1]))[1]
        return SignLowRankParams(*map(torch.stack, zip(*factors)))

    def encode(self, weight: Tensor, params: SignLowRankParams) -> Tensor:
        """Codes (blocks, out, in), uint8: 1 for +, so that each block leaves the least of what those before it left."""
        left, codes = weight.float(), []
        for product in map(_product, *params):
            positive, left = _rest(left, product)
            codes.append(positive)
        return torch.stack(codes).to(torch.uint8)

    def decode(self, codes: Tensor, params: SignLowRankParams) -> Tensor:
        return _sum(zip(codes, *params))

    def block_buffers(self, block: int) -> tuple[str, str, str]:
        """Names of what is stored of a block."""
        return f"signs_{block}", f"up_bits_{block}", f"down_bits_{block}"

    def layout(self, out_features: int, in_features: int) -> dict[str, Buffer]:
        buffers = (
            Buffer((out_features, -(-in_features // 8)), torch.uint8),
            Buffer((out_features, self.rank), torch.int16),
            Buffer((self.rank, in_features), torch.int16),
        )
        return {name: b for block in range(self.blocks) for name, b in zip(self.block_buffers(block), buffers)}

    def pack(self, codes: Tensor, params: SignLowRankParams) -> dict[str, Tensor]:
        signs, up, down = pack_bits(codes, 1), bits_of(params.up), bits_of(params.down)
        return {
            # each a tensor of its own: a file can hold no two that share memory
            name: buffer.clone()
            for block, buffers in enumerate(zip(signs, up, down))
            for name, buffer in zip(self.block_buffers(block), buffers)
        }

    def unpack(self, stored: Stored, shape: tuple[int, int]) -> tuple[Tensor, SignLowRankParams]:
        signs, up, down = map(torch.stack, zip(*self._blocks(stored)))
        params = SignLowRankParams(up.view(torch.float16), down.view(torch.float16))
        return unpack_bits(signs, 1, shape[1]), params

    def prepare(self, stored: Stored, shape: tuple[int, int]) -> tuple[Any, ...]:
        return stored, shape

    def linear(self, x: Tensor, *prepared: Any) -> Tensor:
        stored, shape = prepared

        def decode(rows: slice) -> Tensor:
            return _sum(
                (unpack_bits(signs[rows], 1, shape[1]), up[rows].view(torch.float16), down.view(torch.float16))
                for signs, up, down in self._blocks(stored)
            )

        return decoded_linear(x, decode, shape[0])

    def _blocks(self, stored: Stored) -> Iterator[tuple[Tensor, ...]]:
        for block in range(self.blocks):
            yield tuple(stored[name] for name in self.block_buffers(block))


def _product(up: Tensor, down: Tensor) -> Tensor:
    return up.float() @ down.float()


def _rest(left: Tensor, product: Tensor) -> tuple[Tensor, Tensor]:
    """Where a block has the sign +, and what it leaves of `left`."""
    positive = (left >= 0) == (product >= 0)
    return positive, left - product.where(positive, -product)


def _sum(blocks: Any) -> Tensor:
    """The weight, float32, of the blocks' (codes, up, down)."""
    products = ((codes, _product(up, down)) for codes, up, down in blocks)
    return sum(product.where(codes.bool(), -product) for codes, product in products)  # pyright: ignore[reportReturnType]


def _low_rank(A: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U (m, rank), orthonormal, and S V^T (rank, n) of the first singular values (arXiv:0909.4061, algorithm 4.4)."""
    size = min(rank + _OVERSAMPLING, *A.shape)
    start = torch.randn(A.shape[1], size, generator=torch.Generator().manual_seed(0))
    Q = torch.linalg.qr(A @ start.to(A)).Q
    for _ in range(_PASSES):
        Q = torch.linalg.qr(A.T @ Q).Q
        Q = torch.linalg.qr(A @ Q).Q
    U, S, Vh = torch.linalg.svd(Q.T @ A, full_matrices=False)
    return Q @ U[:, :rank], S[:rank, None] * Vh[:rank]
