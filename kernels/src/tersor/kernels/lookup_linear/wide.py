"""Products with codes of 5 to 8 bits on the CPU: their codebooks are too long for the machine's tables, not for its cache.

A row of weights is looked up one by one, into the cache, and multiplied there with up to 16 rows of x.
"""

# pyright: reportCallIssue=false
# (an intrinsic is called without its first argument)

import numpy as np
from numba import prange
from torch import Tensor

from tersor.kernels import simd
from tersor.kernels.bits.cpu import unpack_bits
from tersor.kernels.cpu import jit, num_threads

_f32 = np.float32

# codes of fewer than 8 bits are unpacked so many at a time
_BLOCK_ELEMENTS = 2**19


def multiply(
    x: Tensor, packed: Tensor, codebook: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, y: Tensor
) -> None:
    """Write x W^T into `y` (..., out); both contiguous, in float32."""
    n, out = x.shape[-1], len(packed)
    codebook, scale = codebook.float().contiguous(), scale.float().contiguous()
    zero_point = None if zero_point is None else zero_point.float().contiguous()
    zeros = 0 if zero_point is None else zero_point.data_ptr()
    num_rows, groups = x.numel() // n, scale.shape[1]
    step = out if bits == 8 else max(1, _BLOCK_ELEMENTS // n)
    for first in range(0, out, step):
        # of 8 bits, the packed bytes are the codes
        codes = packed[first : first + step].contiguous()
        codes = codes if bits == 8 else unpack_bits(codes, bits, n)
        weight = codes.data_ptr(), codes.shape[1], codebook.data_ptr(), scale.data_ptr(), zeros, n, groups
        threads = num_threads(len(codes) * n)
        if threads == 1:
            _multiply(x.data_ptr(), num_rows, y.data_ptr(), out, weight, first, 0, len(codes))
        else:
            _multiply_in_parallel(x.data_ptr(), num_rows, y.data_ptr(), out, weight, first, len(codes), threads)


@jit(parallel=True)
def _multiply_in_parallel(x, num_rows, y, out, weight, first, count, threads):
    for t in prange(threads):
        _multiply(x, num_rows, y, out, weight, first, t * count // threads, (t + 1) * count // threads)


@jit()
def _multiply(x, num_rows, y, out, weight, first, start, stop):
    codes, stride, table, scale, zeros, n, groups = weight
    row_of_entries = np.empty(n, _f32)
    entries = np.int64(row_of_entries.ctypes.data)
    for row in range(start, stop):
        _look_up(codes + row * stride, table, entries, n)
        of_row = 4 * (first + row) * groups
        zeros_of_row = zeros + of_row if zeros else 0
        for m in range(num_rows):
            product = _dot(entries, x + 4 * m * n, scale + of_row, zeros_of_row, n // groups, groups)
            simd.set_float32(y + 4 * (m * out + first + row), product)


@jit()
def _look_up(codes, table, entries, n):
    # of eight codes at a time, which are one number, and one load
    for i in range(0, n - n % 8, 8):
        word = simd.uint64_at(codes + i)
        for k in range(8):
            code = np.int64(word >> np.uint64(8 * k) & np.uint64(255))
            simd.set_float32(entries + 4 * (i + k), simd.float32_at(table + 4 * code))
    for i in range(n - n % 8, n):
        code = np.int64(simd.uint8_at(codes + i))
        simd.set_float32(entries + 4 * i, simd.float32_at(table + 4 * code))


@jit()
def _dot(entries, x, scale, zeros, group_size, groups):
    product, tail, zero = simd.splat(_f32(0)), _f32(0), _f32(0)
    for group in range(groups):
        s = simd.float32_at(scale + 4 * group)
        if zeros:
            zero = simd.float32_at(zeros + 4 * group)
        z = simd.splat(zero)
        sum_0 = sum_1 = simd.splat(_f32(0))
        end = entries + 4 * group_size
        while entries + 64 <= end:
            v_0, v_1 = simd.load_f32(entries), simd.load_f32(entries + 32)
            if zeros:
                v_0, v_1 = simd.sub(v_0, z), simd.sub(v_1, z)
            sum_0 = simd.fma(v_0, simd.load_f32(x), sum_0)
            sum_1 = simd.fma(v_1, simd.load_f32(x + 32), sum_1)
            entries += 64
            x += 64
        rest = _f32(0)
        while entries < end:
            rest += (simd.float32_at(entries) - zero) * simd.float32_at(x)
            entries += 4
            x += 4
        tail += rest * s
        product = simd.fma(simd.add(sum_0, sum_1), simd.splat(s), product)
    return simd.total(product) + tail
