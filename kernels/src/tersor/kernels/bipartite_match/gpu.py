"""Best matches on the GPU: a program keeps the best of a block of A while it walks over B, tile by tile."""

# pyright: reportArgumentType=false, reportCallIssue=false
import torch
import triton
import triton.language as tl
from torch import Tensor

from tersor.kernels.bipartite_match import holds_nan, nan_wins, unit
from tersor.kernels.dispatch import Declined

# float32 on tensor cores, as three products; AMD's have no such mode
_PRECISION = "ieee" if torch.version.hip else "tf32x3"
_BLOCK_A, _BLOCK_B, _BLOCK_DIM = 64, 64, 32


def bipartite_match(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor] | Declined:
    if a.dtype == torch.float64:
        return Declined("float64")
    a, b = unit(a).contiguous(), unit(b).contiguous()
    batch, n, dim = a.shape
    score, index = a.new_zeros(batch, n), a.new_zeros(batch, n, dtype=torch.int64)
    if not a.numel() or not b.numel():
        return score, index
    with torch.cuda.device_of(a):
        blocks = triton.cdiv(n, _BLOCK_A)
        _match[(batch * blocks,)](
            a, b, score, index, n, b.shape[1], dim, blocks, _BLOCK_A, _BLOCK_B, _BLOCK_DIM, _PRECISION
        )
    return nan_wins(holds_nan(a), holds_nan(b), score, index)


@triton.jit
def _match(
    a,
    b,
    score,
    index,
    n,
    m,
    dim,
    blocks,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    i = (tl.program_id(0) % blocks) * BLOCK_A + tl.arange(0, BLOCK_A)
    a += (sample * n + i[:, None]) * dim
    b += sample * m * dim
    best = tl.full((BLOCK_A,), float("-inf"), tl.float32)
    best_at = tl.zeros((BLOCK_A,), tl.int32)
    for start in range(0, m, BLOCK_B):
        j = start + tl.arange(0, BLOCK_B)
        similarity = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
        for first in range(0, dim, BLOCK_DIM):
            c = first + tl.arange(0, BLOCK_DIM)
            tile_a = tl.load(a + c[None, :], mask=(i[:, None] < n) & (c[None, :] < dim), other=0.0)
            at_b = j[None, :].to(tl.int64) * dim + c[:, None]
            tile_b = tl.load(b + at_b, mask=(j[None, :] < m) & (c[:, None] < dim), other=0.0)
            similarity += tl.dot(tile_a, tile_b, input_precision=PRECISION)
        similarity = tl.where(j[None, :] < m, similarity, float("-inf"))
        largest = tl.max(similarity, 1)
        at = tl.min(tl.where(similarity == largest[:, None], j[None, :], m), 1)
        best_at = tl.where(largest > best, at, best_at)
        best = tl.maximum(best, largest)
    tl.store(score + sample * n + i, best, mask=i < n)
    tl.store(index + sample * n + i, best_at.to(tl.int64), mask=i < n)
