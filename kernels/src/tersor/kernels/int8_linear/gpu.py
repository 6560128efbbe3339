"""Products with weights of 8 bits on the GPU: tiles of weights are scaled in registers, or multiplied as integers."""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
import torch
import triton
import triton.language as tl
from torch import Tensor

from tersor.kernels.dispatch import Declined

# float32 on tensor cores, as three products; AMD's have no such mode
_PRECISION = "ieee" if torch.version.hip else "tf32x3"


def int8_linear(x: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor | Declined:
    if x.dtype == torch.float64:
        return Declined("float64")
    out, n = weight.shape
    y = x.new_zeros(*x.shape[:-1], out)
    if x.numel() and out:
        num_rows, group_size, block_k = x.numel() // n, n // scale.shape[1], 64
        block_m, block_n = _blocks(num_rows)
        with torch.cuda.device_of(x):
            _multiply[(triton.cdiv(num_rows, block_m), triton.cdiv(out, block_n))](
                x.contiguous(),
                weight.contiguous(),
                scale.float().contiguous(),
                None if zero_point is None else zero_point.float().contiguous(),
                y,
                num_rows,
                out,
                n,
                group_size,
                scale.shape[1],
                block_m,
                block_n,
                block_k,
                # a tile within one group needs one scale per output row, not one per weight
                group_size % block_k == 0 or scale.shape[1] == 1,
                triton.knobs.runtime.interpret,
                _PRECISION,
            )
    return y


def w8a8_linear(x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor) -> Tensor | Declined:
    if torch.float64 in (x_scale.dtype, scale.dtype):
        return Declined("float64")
    out, n = weight.shape
    y = x_scale.new_zeros(*x.shape[:-1], out)
    if x.numel() and out:
        num_rows = x.numel() // n
        block_m, block_n = _blocks(num_rows)
        with torch.cuda.device_of(x):
            _multiply_int8[(triton.cdiv(num_rows, block_m), triton.cdiv(out, block_n))](
                x.contiguous(),
                x_scale.float().contiguous(),
                weight.contiguous(),
                scale.float().contiguous(),
                y,
                num_rows,
                out,
                n,
                block_m,
                block_n,
                64,
            )
    return y


def _blocks(num_rows: int) -> tuple[int, int]:
    return (16, 32) if num_rows <= 16 else (32, 64) if num_rows <= 32 else (64, 64)


@triton.jit
def _multiply(
    x,
    weight,
    scale,
    zero_point,
    y,
    num_rows,
    out,
    n,
    group_size,
    num_groups,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ONE_GROUP: tl.constexpr,
    INTERPRET: tl.constexpr,
    PRECISION: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    o = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, n, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = (k < n)[:, None] & (o < out)
        tile = tl.load(x + m * n + k[None, :], mask=(m < num_rows) & (k < n)[None, :], other=0.0)
        w = tl.load(weight + o * n + k[:, None], mask=inside, other=0).to(tl.float32)
        if ONE_GROUP:
            at_group, in_group = o * num_groups + start // group_size, o < out
        else:
            at_group, in_group = o * num_groups + (k // group_size)[:, None], inside
        if zero_point is not None:
            w -= tl.load(zero_point + at_group, mask=in_group, other=0.0)
        # beyond the end of a row x is zero, but zero times an infinite weight is not
        w = tl.where(inside, w * tl.load(scale + at_group, mask=in_group, other=0.0), 0.0).to(tile.dtype)
        if INTERPRET:  # the interpreter multiplies the bit patterns of bfloat16
            tile, w = tile.to(tl.float32), w.to(tl.float32)
        total += tl.dot(tile, w, input_precision=PRECISION)
    tl.store(y + m * out + o, total.to(y.dtype.element_ty), mask=(m < num_rows) & (o < out))


@triton.jit
def _multiply_int8(
    x,
    x_scale,
    weight,
    scale,
    y,
    num_rows,
    out,
    n,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    o = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for start in range(0, n, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        tile = tl.load(x + m * n + k[None, :], mask=(m < num_rows) & (k < n)[None, :], other=0)
        w = tl.load(weight + o * n + k[:, None], mask=(k < n)[:, None] & (o < out), other=0)
        total += tl.dot(tile, w, out_dtype=tl.int32)
    product = total.to(tl.float32) * tl.load(scale + o, mask=o < out, other=0.0)
    product *= tl.load(x_scale + m, mask=m < num_rows, other=0.0)
    tl.store(y + m * out + o, product.to(y.dtype.element_ty), mask=(m < num_rows) & (o < out))
