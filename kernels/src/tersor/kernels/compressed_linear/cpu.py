"""Products with compressed weights on the CPU, without ever holding more than a few rows of weights.

Up to 8 rows of x: one row of weights at a time is decoded and multiplied while it is in the cache.
More: blocks of rows are decoded, and torch multiplies them.
"""

# pyright: reportCallIssue=false
# (an intrinsic is called without its first argument)

import numpy as np
import torch
from numba import prange
from torch import Tensor

from tersor.kernels.coding import padded, require
from tersor.kernels.coding.cpu import aligned, as_float, end_copy
from tersor.kernels.cpu import REORDER, array, jit, num_threads
from tersor.kernels.dispatch import Declined
from tersor.kernels.tiered import ANOTHER_NIBBLES, open_table
from tersor.kernels.tiered.cpu import decode_groups, expands, nibble_bytes_of

_u8, _u32, _f32 = np.uint8, np.uint32, np.float32

# beyond, a matrix product of torch's is faster; x must also stay in the second-level cache
_MAX_ROWS, _MAX_ELEMENTS = 8, 2**16
# decoded weights held at a time: 2 MiB, or as much as x takes
_BLOCK_ELEMENTS = 2**19


def compressed_linear(
    x: Tensor, sign_mantissa: Tensor, table: Tensor, stream: Tensor, side: Tensor, offsets: Tensor
) -> Tensor | Declined:
    if x.dtype == torch.float64:
        return Declined("float64")
    out, n = sign_mantissa.shape
    rows = x.reshape(x.shape[:-1].numel(), n).float().contiguous()
    y = torch.zeros(len(rows), out, dtype=torch.float32)
    symbols = out * padded(n, 64)
    base, base2, nibbles, raw = open_table("compressed_linear", table, stream, side, symbols)
    if y.numel() and n:
        planes = aligned(stream)[: symbols // 4].view(np.uint64).reshape(out, -1)
        nibbles = nibbles.contiguous()
        weight = (
            array(sign_mantissa.contiguous()),
            planes,
            array(nibbles),
            end_copy(nibbles),
            array(raw.contiguous()),
            array(offsets.contiguous()),
            _u8(base),
            _u8(base2),
            expands(),
        )
        threads = num_threads(2 * out * n)
        if len(rows) <= _MAX_ROWS and (len(rows) == 1 or rows.numel() <= _MAX_ELEMENTS):
            decoded = torch.empty(0, n, dtype=torch.float32)
            _run(weight, array(rows), array(y), array(decoded), 0, out, threads)
        else:
            block = torch.empty(min(out, max(1, max(_BLOCK_ELEMENTS, rows.numel()) // n)), n, dtype=torch.float32)
            for start in range(0, out, len(block)):
                decoded = block[: out - start]
                _run(weight, array(rows[:0]), array(y[:0]), array(decoded), start, start + len(decoded), threads)
                torch.matmul(rows, decoded.T, out=y[:, start : start + len(decoded)])
    return y.to(x.dtype).view(*x.shape[:-1], out)


def _run(weight, x, y, decoded, start: int, stop: int, threads: int) -> None:
    if threads == 1:
        fits = _rows(weight, x, y, decoded, start, start, stop)
    else:
        fits = _all_rows(weight, x, y, decoded, start, stop, threads) == threads
    require("compressed_linear", fits, ANOTHER_NIBBLES)


@jit(nogil=True, fastmath=REORDER)
def _rows(weight, x, y, decoded, first, start, stop):
    """Products of rows `start` ... `stop` with x, or, without x, these rows themselves from `first` on.

    False if `side` holds less than the rows need.
    """
    sign_mantissa, planes, nibbles, nibbles_end, raw, offsets, base, base2, expand = weight
    n = sign_mantissa.shape[1]
    words = np.empty(4 * planes.shape[1], np.uint64)
    exponent = words.view(np.uint8)[:n]
    values = np.empty(n, np.float32)
    for row in range(start, stop):
        nibble_start, raw_start = offsets[row, 0], offsets[row, 1]
        last = nibbles.size - nibble_bytes_of(planes[row])
        if nibble_start < 0 or nibble_start > last or raw_start < 0:
            return False
        stream = nibbles, nibbles_end
        if decode_groups(planes[row], stream, raw, base, base2, words, nibble_start, raw_start, expand) < 0:
            return False
        if len(x) == 1:
            y[0, row] = _dot_weights(exponent, sign_mantissa[row], x[0])
            continue
        values = decoded[row - first] if len(decoded) else values
        _merge(exponent, sign_mantissa[row], values)
        for m in range(len(x)):
            y[m, row] = _dot(values, x[m])
    return True


@jit(parallel=True)
def _all_rows(weight, x, y, decoded, start, stop, threads):
    """How many threads had what their rows need."""
    fits = 0
    rows = stop - start
    for t in prange(threads):
        fits += int(_rows(weight, x, y, decoded, start, start + t * rows // threads, start + (t + 1) * rows // threads))
    return fits


@jit()
def _value(exponent, sign_mantissa):
    rest = _u32(sign_mantissa)
    return as_float(_u32(exponent) << _u32(23) | (rest & _u32(254)) << _u32(15) | rest << _u32(31))


@jit()
def _merge(exponent, sign_mantissa, values):
    for j in range(values.size):
        values[j] = _value(exponent[j], sign_mantissa[j])


@jit(fastmath=REORDER)
def _dot_weights(exponent, sign_mantissa, x):
    total = _f32(0)
    for j in range(x.size):
        total += _value(exponent[j], sign_mantissa[j]) * x[j]
    return total


@jit(fastmath=REORDER)
def _dot(a, b):
    total = _f32(0)
    for j in range(a.size):
        total += a[j] * b[j]
    return total
