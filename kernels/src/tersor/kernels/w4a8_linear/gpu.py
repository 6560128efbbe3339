"""Products of weights of 4 bits with activations of 8 on the GPU: tiles of codes become int8 in registers."""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
import torch
import triton
import triton.language as tl
from torch import Tensor

from tersor.kernels.dispatch import Declined


def w4a8_linear(
    x: Tensor,
    x_scale: Tensor,
    packed: Tensor,
    scale: Tensor,
    group_scale: Tensor | None = None,
    zero_point: Tensor | None = None,
) -> Tensor | Declined:
    if torch.float64 in (x_scale.dtype, scale.dtype):
        return Declined("float64")
    out, n = len(packed), x.shape[-1]
    y = x_scale.new_zeros(*x.shape[:-1], out)
    if x.numel() and out:
        num_rows = x.numel() // n
        groups = next((tensor.shape[1] for tensor in (group_scale, zero_point) if tensor is not None), 1)
        block_m, block_n = (16, 32) if num_rows <= 16 else (32, 64) if num_rows <= 32 else (64, 64)
        with torch.cuda.device_of(x):
            _multiply[(triton.cdiv(num_rows, block_m), triton.cdiv(out, block_n))](
                x.contiguous(),
                x_scale.float().contiguous(),
                packed.contiguous(),
                scale.float().contiguous(),
                None if group_scale is None else group_scale.contiguous(),
                None if zero_point is None else zero_point.contiguous(),
                y,
                num_rows,
                out,
                n,
                packed.shape[1],
                n // groups,
                groups,
                block_m,
                block_n,
                64,
            )
    return y


@triton.jit
def _multiply(
    x,
    x_scale,
    packed,
    scale,
    group_scale,
    zero_point,
    y,
    num_rows,
    out,
    n,
    nbytes,
    group_size,
    num_groups,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    o = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for start in range(0, nbytes, BLOCK_K):
        j = start + tl.arange(0, BLOCK_K)
        halves = tl.load(packed + o * nbytes + j[:, None], mask=(j < nbytes)[:, None] & (o < out), other=0)
        for upper in tl.static_range(2):
            # 16 * code: the other half of the byte is shifted out, or cleared
            w = (halves & 240 if upper else halves << 4).to(tl.int8)
            k = j + upper * nbytes
            inside = (j < nbytes) & (k < n)
            if group_scale is not None or zero_point is not None:
                at_group, in_group = o * num_groups + (k // group_size)[:, None], inside[:, None] & (o < out)
                w = w.to(tl.int32) >> 4
                if zero_point is not None:
                    w -= tl.load(zero_point + at_group, mask=in_group, other=0).to(tl.int32)
                if group_scale is not None:
                    w *= tl.load(group_scale + at_group, mask=in_group, other=0).to(tl.int32)
                w = w.to(tl.int8)
            tile = tl.load(x + m * n + k[None, :], mask=(m < num_rows) & inside[None, :], other=0)
            total += tl.dot(tile, w, out_dtype=tl.int32)
    if group_scale is None and zero_point is None:
        total = total >> 4
    product = total.to(tl.float32) * tl.load(scale + o, mask=o < out, other=0.0)
    product *= tl.load(x_scale + m, mask=m < num_rows, other=0.0)
    tl.store(y + m * out + o, product.to(y.dtype.element_ty), mask=(m < num_rows) & (o < out))
