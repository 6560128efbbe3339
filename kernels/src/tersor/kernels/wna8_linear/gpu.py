"""Products of packed weights with activations of 8 bits on the GPU: tiles of codes become int8 in registers.

The layout and the walk over it are those of `dequant_matmul`. A tile within one group is a product of integers; where
groups are narrower than tiles, weights and x become float32.
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
import torch
import triton
import triton.language as tl
from torch import Tensor

from tersor.kernels.dequant_matmul.gpu import PRECISION, plane
from tersor.kernels.dispatch import Declined


def wna8_linear(
    x: Tensor, x_scale: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor, bits: int, group_size: int
) -> Tensor | Declined:
    if torch.float64 in (x_scale.dtype, scale.dtype):
        return Declined("float64")
    n, out = x.shape[-1], len(packed)
    y = x_scale.new_zeros(*x.shape[:-1], out)
    if x.numel() and out:
        num_rows, c = x.numel() // n, (n + 7) // 8
        narrowest = bits & -bits
        # tensor cores take int8 by 32 at least
        block_t = 32 if narrowest < 4 else 64
        one_group = group_size % block_t == 0 and narrowest * c % group_size == 0
        block_m = 16 if num_rows <= 16 else 32 if num_rows <= 32 else 64
        block_n = 32 if num_rows <= 16 else 64
        with torch.cuda.device_of(x):
            _multiply[(triton.cdiv(num_rows, block_m), triton.cdiv(out, block_n))](
                x.contiguous(),
                x_scale.float().contiguous(),
                packed.contiguous(),
                scale.float().contiguous(),
                zero_point.float().contiguous(),
                y,
                num_rows,
                out,
                n,
                c,
                group_size,
                n // group_size,
                x_scale.shape[-1],
                bits,
                block_m,
                block_n,
                block_t,
                one_group,
                PRECISION,
            )
    return y


@triton.jit
def _multiply(
    x,
    x_scale,
    packed,
    scale,
    zero_point,
    y,
    num_rows,
    out,
    n,
    c,
    group_size,
    num_groups,
    x_groups,
    BITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    ONE_GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    NARROWEST: tl.constexpr = BITS & -BITS
    # codes of 8 bits become int8 less this; so does their zero point
    MIDDLE: tl.constexpr = BITS // 8 * 128
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    o = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    field = NARROWEST * c
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, field, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        for f in tl.static_range(8 // NARROWEST):
            k = f * field + t
            inside = (t < field) & (k < n)
            weight_inside = inside[:, None] & (o < out)
            code = tl.zeros((BLOCK_T, BLOCK_N), tl.int32)
            for p in tl.static_range(4):
                if BITS & (8 >> p):
                    code |= plane(packed + o * (c * BITS), f, t[:, None], c, weight_inside, BITS, 8 >> p)
            tile = tl.load(x + m * n + k[None, :], mask=(m < num_rows) & inside[None, :], other=0)
            if ONE_GROUP:
                group = (f * field + start) // group_size
                at_group = o * num_groups + group
                zero = tl.load(zero_point + at_group, mask=o < out, other=0.0) - MIDDLE
                step = tl.load(scale + at_group, mask=o < out, other=0.0)
                at_x = m * x_groups + tl.minimum(group, x_groups - 1)
                x_step = tl.load(x_scale + at_x, mask=m < num_rows, other=0.0)
                dot = tl.dot(tile, (code - MIDDLE).to(tl.int8), out_dtype=tl.int32).to(tl.float32)
                x_sum = tl.sum(tile.to(tl.int32), 1)[:, None].to(tl.float32)
                total += (dot - zero * x_sum) * step * x_step
            else:
                at_group = o * num_groups + (k // group_size)[:, None]
                zero = tl.load(zero_point + at_group, mask=weight_inside, other=0.0)
                step = tl.load(scale + at_group, mask=weight_inside, other=0.0)
                at_x = m * x_groups + tl.minimum(k // group_size, x_groups - 1)[None, :]
                x_step = tl.load(x_scale + at_x, mask=(m < num_rows) & inside[None, :], other=0.0)
                weight = (code.to(tl.float32) - zero) * step
                total += tl.dot(tile.to(tl.float32) * x_step, weight, input_precision=PRECISION)
    tl.store(y + m * out + o, total.to(y.dtype.element_ty), mask=(m < num_rows) & (o < out))
