"""Products with packed weights on the GPU: codes become weights in registers, tile by tile.

In the layout of `bits`, a row of `in` codes is 8 / u fields of T = u ceil(in / 8) codes, u the narrowest plane. For one
t, the codes t, T + t, 2 T + t, ... come from the same few bytes; a program walks over t and multiplies field by field.
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
import torch
import triton
import triton.language as tl
from torch import Tensor

from tersor.kernels.dispatch import Declined

# float32 on tensor cores, as three products; AMD's have no such mode
PRECISION = "ieee" if torch.version.hip else "tf32x3"


def dequant_matmul(
    x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor, bits: int, group_size: int
) -> Tensor | Declined:
    if x.dtype == torch.float64:
        return Declined("float64")
    return multiply(x, packed, None, scale, zero_point, bits, group_size)


def multiply(
    x: Tensor,
    packed: Tensor,
    codebook: Tensor | None,
    scale: Tensor,
    zero_point: Tensor | None,
    bits: int,
    group_size: int,
) -> Tensor:
    """x @ ((codebook[codes] - zero_point) * scale).T, also for `lookup_linear`; without a codebook, of the codes."""
    n, out = x.shape[-1], len(packed)
    rows = x.reshape(x.shape[:-1].numel(), n).contiguous()
    y = x.new_zeros(len(rows), out)
    if rows.numel() and out:
        c = (n + 7) // 8
        narrowest = bits & -bits
        # a program's step is 8 / narrowest tiles of t
        block_t = min(16 * narrowest, 64)
        # a tile within one group needs one scale per output row, not one per weight
        one_group = group_size % block_t == 0 and narrowest * c % group_size == 0
        block_m = 16 if len(rows) <= 16 else 32 if len(rows) <= 32 else 64
        block_n = 32 if len(rows) <= 16 else 64
        with torch.cuda.device_of(x):
            _multiply[(triton.cdiv(len(rows), block_m), triton.cdiv(out, block_n))](
                rows,
                packed.contiguous(),
                None if codebook is None else codebook.float().contiguous(),
                scale.float().contiguous(),
                None if zero_point is None else zero_point.float().contiguous(),
                y,
                len(rows),
                out,
                n,
                c,
                group_size,
                n // group_size,
                bits,
                block_m,
                block_n,
                block_t,
                one_group,
                triton.knobs.runtime.interpret,
                PRECISION,
            )
    return y.view(*x.shape[:-1], out)


@triton.jit
def _multiply(
    x,
    packed,
    codebook,
    scale,
    zero_point,
    y,
    num_rows,
    out,
    n,
    c,
    group_size,
    num_groups,
    BITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    ONE_GROUP: tl.constexpr,
    INTERPRET: tl.constexpr,
    PRECISION: tl.constexpr,
):
    NARROWEST: tl.constexpr = BITS & -BITS
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
            if codebook is None:
                weight = code.to(tl.float32)
            else:
                weight = tl.load(codebook + code, mask=weight_inside, other=0.0)
            if ONE_GROUP:
                at_group, in_group = o * num_groups + (f * field + start) // group_size, o < out
            else:
                at_group, in_group = o * num_groups + (k // group_size)[:, None], weight_inside
            if zero_point is not None:
                weight -= tl.load(zero_point + at_group, mask=in_group, other=0.0)
            weight *= tl.load(scale + at_group, mask=in_group, other=0.0)
            tile = tl.load(x + m * n + k[None, :], mask=(m < num_rows) & inside[None, :], other=0.0)
            weight = weight.to(tile.dtype)
            if INTERPRET:  # the interpreter multiplies the bit patterns of bfloat16
                tile, weight = tile.to(tl.float32), weight.to(tl.float32)
            total += tl.dot(tile, weight, input_precision=PRECISION)
    tl.store(y + m * out + o, total.to(y.dtype.element_ty), mask=(m < num_rows) & (o < out))


@triton.jit
def plane(packed, f: tl.constexpr, t, c, inside, BITS: tl.constexpr, WIDTH: tl.constexpr):
    """What the plane of this width holds of the codes t of field f."""
    SHIFT: tl.constexpr = BITS & -(2 * WIDTH)
    NARROWEST: tl.constexpr = BITS & -BITS
    # the plane's own fields are this many times as long
    FIELDS: tl.constexpr = WIDTH // NARROWEST
    at = SHIFT * c + (f % FIELDS) * NARROWEST * c + t
    byte = tl.load(packed + at, mask=inside, other=0).to(tl.int32)
    return ((byte >> (f // FIELDS * WIDTH)) & ((1 << WIDTH) - 1)) << SHIFT
