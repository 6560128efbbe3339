"""The Hadamard transform on the GPU: one program transforms a tile of A rows by B columns, H_A @ tile @ H_B."""

# pyright: reportArgumentType=false
import torch
import triton
import triton.language as tl
from torch import Tensor

from tersor.kernels.dispatch import Declined
from tersor.kernels.hadamard.matrix import hadamard_matrix, split

# the largest power of two in one program: a tile of 64 x 64. Twice as much takes minutes to compile
_LARGEST = 2**12
# float32 on tensor cores, as three products; AMD's have no such mode
_PRECISION = "ieee" if torch.version.hip else "tf32x3"


def hadamard(x: Tensor, block_size: int | None = None) -> Tensor | Declined:
    if x.dtype == torch.float64:
        return Declined("float64")
    block = x.shape[-1] if block_size is None else block_size
    if x.numel() == 0:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    inner = min(split(block)[1], _LARGEST)
    outer = block // inner  # H = H_outer (x) H_inner
    x = x.contiguous()
    y = torch.empty_like(x, dtype=x.dtype if outer == 1 else torch.float32)
    a = max(1, 2 ** (inner.bit_length() // 2)) if inner > 128 else 1
    b = inner // a
    # tl.dot wants 16 rows and columns at least: small blocks are one row each, of a tile that is zero from column b on
    rows, columns = max(a, 16), max(b, 16)
    with torch.cuda.device_of(x):
        grid = (triton.cdiv(x.numel() // b, rows),)
        _transform[grid](x, y, x.numel() // b, inner**-0.5, a, b, rows, columns, _PRECISION)
    if outer > 1:
        y = (hadamard_matrix(outer, y.dtype, y.device) @ y.view(-1, outer, inner)).view(x.shape).to(x.dtype)
    return y


@triton.jit
def _sylvester(SIZE: tl.constexpr):
    """(-1)^popcount(i & j), for SIZE up to 256."""
    parity = tl.arange(0, SIZE)[:, None] & tl.arange(0, SIZE)[None, :]
    parity ^= parity >> 4
    parity ^= parity >> 2
    parity ^= parity >> 1
    return 1.0 - 2.0 * (parity & 1).to(tl.float32)


@triton.jit
def _transform(
    x,
    y,
    num_rows,
    norm,
    A: tl.constexpr,
    B: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    at = row * B + column
    inside = (row < num_rows) & (column < B)
    tile = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    tile = tl.dot(tile, _sylvester(COLUMNS), input_precision=PRECISION)
    if A > 1:
        tile = tl.dot(_sylvester(ROWS), tile, input_precision=PRECISION)
    tl.store(y + at, (tile * norm).to(y.dtype.element_ty), mask=inside)
