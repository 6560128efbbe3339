"""Products of bit planes on the GPU: tiles of planes become bytes in registers, which tensor cores multiply.

Binary products would need an instruction that Triton does not have. Codes are taken less 2^(bits - 1), so that they fit
in int8; what that and the zero points change is made good from the sums over either side.
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
import torch
import triton
import triton.language as tl
from torch import Tensor

from tersor.kernels.dispatch import Declined


def bitplane_linear(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    group_size: int,
) -> Tensor | Declined:
    return _linear(x, x_scale, x_zero_point, weight, scale, zero_point, group_size)


def bipolar_linear(x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, group_size: int) -> Tensor | Declined:
    return _linear(x, x_scale, None, weight, scale, None, group_size)


def _linear(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    group_size: int,
) -> Tensor | Declined:
    if torch.float64 in (x_scale.dtype, scale.dtype):
        return Declined("float64")
    out, groups, bits, nbytes = weight.shape
    y = x_scale.new_zeros(*x_scale.shape, out)
    if y.numel() and groups:
        num_rows = x_scale.numel()
        block_m, block_n = (16, 32) if num_rows <= 16 else (64, 64)
        with torch.cuda.device_of(x):
            _multiply[(triton.cdiv(num_rows, block_m), triton.cdiv(out, block_n))](
                x.contiguous(),
                x_scale.float().contiguous(),
                None if x_zero_point is None else x_zero_point.contiguous(),
                weight.contiguous(),
                scale.float().contiguous(),
                None if zero_point is None else zero_point.contiguous(),
                y,
                num_rows,
                out,
                groups,
                nbytes,
                group_size,
                x.shape[-2],
                bits,
                block_m,
                block_n,
                32,
            )
    return y


@triton.jit
def _multiply(
    x,
    x_scale,
    x_zero_point,
    weight,
    scale,
    zero_point,
    y,
    num_rows,
    out,
    groups,
    nbytes,
    group_size,
    X_BITS: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    o = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    x_half: tl.constexpr = 1 << (X_BITS - 1)
    half: tl.constexpr = 1 << (BITS - 1)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for group in range(groups):
        product = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
        x_sum, w_sum = tl.zeros((BLOCK_M,), tl.int32), tl.zeros((BLOCK_N,), tl.int32)
        for start in range(0, nbytes, BLOCK_BYTES):
            k = start + tl.arange(0, BLOCK_BYTES)
            at_x = x + (m * groups + group) * X_BITS * nbytes + k[None, :]
            at_w = weight + (o * groups + group) * BITS * nbytes + k[:, None]
            # bit t of byte k belongs to code t * nbytes + k
            for bit in range(8):
                inside = (k < nbytes) & (bit * nbytes + k < group_size)
                x_inside, w_inside = (m < num_rows) & inside[None, :], inside[:, None] & (o < out)
                codes = tl.zeros((BLOCK_M, BLOCK_BYTES), tl.int32)
                for i in tl.static_range(X_BITS):
                    plane = tl.load(at_x + i * nbytes, mask=x_inside, other=0).to(tl.int32)
                    codes |= ((plane >> bit) & 1) << i
                x_tile = tl.where(x_inside, codes - x_half, 0)
                codes = tl.zeros((BLOCK_BYTES, BLOCK_N), tl.int32)
                for i in tl.static_range(BITS):
                    plane = tl.load(at_w + i * nbytes, mask=w_inside, other=0).to(tl.int32)
                    codes |= ((plane >> bit) & 1) << i
                w_tile = tl.where(w_inside, codes - half, 0)
                product += tl.dot(x_tile.to(tl.int8), w_tile.to(tl.int8), out_dtype=tl.int32)
                x_sum += tl.sum(x_tile, 1)
                w_sum += tl.sum(w_tile, 0)
        at_group = o * groups + group
        if zero_point is None:
            # an odd integer is 2 (code - half) + 1
            product = 4 * product + 2 * (x_sum[:, None] + w_sum[None, :]) + group_size
        else:
            x_zero = tl.load(x_zero_point + m, mask=m < num_rows, other=0).to(tl.int32) - x_half
            zero = tl.load(zero_point + at_group, mask=o < out, other=0).to(tl.int32) - half
            product += group_size * x_zero * zero - x_zero * w_sum[None, :] - zero * x_sum[:, None]
        total += product.to(tl.float32) * tl.load(scale + at_group, mask=o < out, other=0.0)
    total *= tl.load(x_scale + m, mask=m < num_rows, other=0.0)
    tl.store(y + m * out + o, total.to(y.dtype.element_ty), mask=(m < num_rows) & (o < out))
