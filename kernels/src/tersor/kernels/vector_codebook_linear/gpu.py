"""Products with additive codebooks on the GPU: tiles of weights are gathered from codebooks in the cache."""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
import torch
import triton
import triton.language as tl
from torch import Tensor

from tersor.kernels.dispatch import Declined

# float32 on tensor cores, as three products; AMD's have no such mode
_PRECISION = "ieee" if torch.version.hip else "tf32x3"


def vector_codebook_linear(x: Tensor, codes: Tensor, codebooks: Tensor, scale: Tensor) -> Tensor | Declined:
    if x.dtype == torch.float64:
        return Declined("float64")
    (out, groups, num_codebooks), (_, entries, group_size) = codes.shape, codebooks.shape
    y = x.new_zeros(*x.shape[:-1], out)
    if x.numel() and out:
        n = x.shape[-1]
        num_rows = x.numel() // n
        block_m = 16 if num_rows <= 16 else 32 if num_rows <= 32 else 64
        block_n = 32 if num_rows <= 16 else 64
        with torch.cuda.device_of(x):
            _multiply[(triton.cdiv(num_rows, block_m), triton.cdiv(out, block_n))](
                x.contiguous(),
                codes.contiguous(),
                codebooks.contiguous(),
                scale.float().contiguous(),
                y,
                num_rows,
                out,
                n,
                entries,
                group_size,
                groups,
                num_codebooks,
                block_m,
                block_n,
                64,
                triton.knobs.runtime.interpret,
                _PRECISION,
            )
    return y


@triton.jit
def _multiply(
    x,
    codes,
    codebooks,
    scale,
    y,
    num_rows,
    out,
    n,
    entries,
    group_size,
    groups,
    num_codebooks,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INTERPRET: tl.constexpr,
    PRECISION: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    o = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    s = tl.load(scale + o, mask=o < out, other=0.0)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, n, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = (k < n)[:, None] & (o < out)
        weight = tl.zeros((BLOCK_K, BLOCK_N), tl.float32)
        at = (o * groups + (k // group_size)[:, None]) * num_codebooks
        for codebook in range(num_codebooks):
            code = tl.load(codes + at + codebook, mask=inside, other=0).to(tl.int32) & (entries - 1)
            entry = (codebook * entries + code) * group_size + (k % group_size)[:, None]
            weight += tl.load(codebooks + entry, mask=inside, other=0.0).to(tl.float32)
        tile = tl.load(x + m * n + k[None, :], mask=(m < num_rows) & (k < n)[None, :], other=0.0)
        # beyond the end of a row x is zero, but zero times an infinite weight is not
        weight = tl.where(inside, weight * s, 0.0).to(tile.dtype)
        if INTERPRET:  # the interpreter multiplies the bit patterns of bfloat16
            tile, weight = tile.to(tl.float32), weight.to(tl.float32)
        total += tl.dot(tile, weight, input_precision=PRECISION)
    tl.store(y + m * out + o, total.to(y.dtype.element_ty), mask=(m < num_rows) & (o < out))
