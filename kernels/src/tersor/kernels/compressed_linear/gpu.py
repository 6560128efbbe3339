"""Products with compressed weights on the GPU: tiers become weights in registers, 64 columns at a time."""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
import torch
import triton
import triton.language as tl
from torch import Tensor

from tersor.kernels.coding import padded
from tersor.kernels.coding.gpu import code_of
from tersor.kernels.dispatch import Declined
from tersor.kernels.tiered import open_table

# float32 on tensor cores, as three products; AMD's have no such mode
_PRECISION = "ieee" if torch.version.hip else "tf32x3"


def compressed_linear(
    x: Tensor, sign_mantissa: Tensor, table: Tensor, stream: Tensor, side: Tensor, offsets: Tensor
) -> Tensor | Declined:
    if x.dtype == torch.float64:
        return Declined("float64")
    out, n = sign_mantissa.shape
    rows = x.reshape(x.shape[:-1].numel(), n).contiguous()
    y = x.new_zeros(len(rows), out)
    length = padded(n, 64)
    base, base2, nibbles, raw = open_table("compressed_linear", table, stream, side, out * length)
    if y.numel() and n:
        block_m = 16 if len(rows) <= 16 else 32 if len(rows) <= 32 else 64
        block_n = 16 if len(rows) <= 16 else 32
        with torch.cuda.device_of(x):
            _multiply[(triton.cdiv(len(rows), block_m), triton.cdiv(out, block_n))](
                rows,
                sign_mantissa.contiguous(),
                stream.contiguous(),
                nibbles.contiguous(),
                raw.contiguous(),
                offsets.contiguous(),
                y,
                len(rows),
                out,
                n,
                length // 64,
                nibbles.numel(),
                raw.numel(),
                base,
                base2,
                block_m,
                block_n,
                # weights are exact in bfloat16, but may overflow in float16
                x.dtype == torch.bfloat16 and not triton.knobs.runtime.interpret,
                _PRECISION,
            )
    return y.view(*x.shape[:-1], out)


@triton.jit
def _multiply(
    x,
    sign_mantissa,
    stream,
    nibbles,
    raw,
    offsets,
    y,
    num_rows,
    out,
    n,
    num_groups,
    nibble_bytes,
    raw_bytes,
    base,
    base2,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BFLOAT16: tl.constexpr,
    PRECISION: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    o = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, 64)[None, :]
    row = o[:, None]
    nibble_start = tl.load(offsets + 2 * o, mask=o < out, other=0)
    raw_start = tl.load(offsets + 2 * o + 1, mask=o < out, other=0)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for g in range(num_groups):
        k = g * 64 + lane
        inside = (row < out) & (k < n)
        # rows are padded in the stream: all 64 codes count for where the next group's escapes start
        code = code_of(stream, row * num_groups + g, lane, (row < out) & (lane >= 0), 2)
        escaped = (code == 3).to(tl.int32)
        rank = tl.cumsum(escaped, 1) - escaped
        byte = nibble_start[:, None] + rank // 2
        known = (escaped > 0) & (byte >= 0) & (byte < nibble_bytes)
        nibble = (tl.load(nibbles + byte, mask=known, other=0).to(tl.int32) >> (rank % 2 * 4)) & 15
        deep = ((escaped > 0) & (nibble == 15)).to(tl.int32)
        at = raw_start[:, None] + tl.cumsum(deep, 1) - deep
        third = tl.load(raw + at, mask=(deep > 0) & (at >= 0) & (at < raw_bytes), other=0).to(tl.int32)
        nibble_start += (tl.sum(escaped, 1) + 1) // 2
        raw_start += tl.sum(deep, 1)
        exponent = tl.where(escaped > 0, tl.where(deep > 0, third, base2 + nibble), base + code)
        rest = tl.load(sign_mantissa + row * n + k, mask=inside, other=0).to(tl.int32)
        bits = (exponent << 23) | ((rest & 254) << 15) | (rest << 31)
        weight = tl.where(inside, bits, 0).to(tl.float32, bitcast=True)
        tile = tl.load(x + m * n + k, mask=(m < num_rows) & (k < n), other=0.0)
        if BFLOAT16:
            weight = weight.to(tl.bfloat16)
        else:
            tile = tile.to(tl.float32)
        total += tl.dot(tile, tl.trans(weight), input_precision=PRECISION)
    tl.store(y + m * out + row.T, total.to(y.dtype.element_ty), mask=(m < num_rows) & (out > row.T))
