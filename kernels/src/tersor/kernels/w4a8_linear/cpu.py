"""Products of weights of 4 bits with activations of 8 on the CPU.

Up to 32 rows of x: one row of weights after the other, while it is in the cache, in vectors of 16 * code. More, or
without vectors: blocks of weights become int8.
"""

# pyright: reportCallIssue=false
# (an intrinsic is called without its first argument)

import numpy as np
import torch
from numba import prange
from torch import Tensor

from tersor.kernels import simd
from tersor.kernels.cpu import jit, num_threads
from tersor.kernels.int8_linear import scaled
from tersor.kernels.int8_linear.cpu import AHEAD, MAX_INT8_ROWS, integer_product
from tersor.kernels.w4a8_linear import decode


def w4a8_linear(
    x: Tensor,
    x_scale: Tensor,
    packed: Tensor,
    scale: Tensor,
    group_scale: Tensor | None = None,
    zero_point: Tensor | None = None,
) -> Tensor:
    out, n = len(packed), x.shape[-1]
    product = torch.zeros(*x.shape[:-1], out, dtype=torch.int32)
    if x.numel() and out:
        num_rows = x.numel() // n
        grid = [None if tensor is None else tensor.contiguous() for tensor in (group_scale, zero_point)]
        groups = next((tensor.shape[1] for tensor in grid if tensor is not None), 1)
        if num_rows <= MAX_INT8_ROWS and simd.available():
            words, packed = x.to(torch.int16).contiguous(), packed.contiguous()
            # (rows, groups): a zero point is subtracted from all codes of a group at once
            sums = words.view(num_rows, groups, -1).sum(-1, dtype=torch.int32) if zero_point is not None else None
            addresses = [0 if tensor is None else tensor.data_ptr() for tensor in (words, packed, *grid, sums, product)]
            threads = num_threads(packed.numel())
            if threads == 1:
                _multiply(*addresses, num_rows, out, n, groups, 0, out)
            else:
                _multiply_in_parallel(*addresses, num_rows, out, n, groups, threads)
        else:

            def rows_of(rows: slice) -> Tensor:
                return decode(packed[rows], n, *(None if tensor is None else tensor[rows] for tensor in grid))

            integer_product(x.reshape(num_rows, n), rows_of, product.view(num_rows, out))
    return scaled(product, x_scale, scale)


@jit()
def _multiply(x, packed, group_scale, zero_point, sums, product, num_rows, out, n, groups, start, stop):
    nbytes = 4 * ((n + 7) // 8)
    for row in range(start, stop):
        scales = group_scale + row * groups if group_scale else 0
        zeros = zero_point + row * groups if zero_point else 0
        for m in range(num_rows):
            dot = _dot(x + 2 * m * n, packed + row * nbytes, scales, zeros, sums + 4 * m * groups, n, nbytes, groups)
            simd.set_int32(product + 4 * (m * out + row), dot)


@jit(parallel=True)
def _multiply_in_parallel(x, packed, group_scale, zero_point, sums, product, num_rows, out, n, groups, threads):
    for t in prange(threads):
        first, last = t * out // threads, (t + 1) * out // threads
        _multiply(x, packed, group_scale, zero_point, sums, product, num_rows, out, n, groups, first, last)


@jit()
def _dot(x, packed, group_scale, zero_point, sums, n, nbytes, groups):
    size, total, rest = n // groups, simd.zero_int32(), np.int32(0)
    for group in range(groups):
        start, end = group * size, (group + 1) * size
        scale = simd.int8_at(group_scale + group) if group_scale else np.int8(1)
        # the first `nbytes` codes are in the lower halves of the bytes, the others in the upper ones
        middle = min(max(nbytes, start), end)
        tail = np.int32(0)
        # each lane is a multiple of 16, and sums may go round as long as the last one fits
        if start < middle:
            part, more = _dot_low(x + 2 * start, packed + start, middle - start)
            total = simd.add_i32(total, simd.shift_and_scale(part, 4, scale))
            tail = np.int32(tail + (more >> 4))
        if middle < end:
            part, more = _dot_high(x + 2 * middle, packed + middle - nbytes, end - middle)
            total = simd.add_i32(total, simd.shift_and_scale(part, 4, scale))
            tail = np.int32(tail + (more >> 4))
        if zero_point:
            tail = np.int32(tail - np.int32(simd.int8_at(zero_point + group)) * simd.int32_at(sums + 4 * group))
        rest = np.int32(rest + tail * np.int32(scale))
    return np.int32(simd.total_i32(total) + rest)


@jit()
def _dot_low(x, packed, count):
    """16 times the sums over the codes in the lower halves of `count` bytes: in lanes, and of the last bytes."""
    sum_0 = sum_1 = simd.zero_int32()
    end = packed + count
    while packed + 32 <= end:
        simd.prefetch(packed + AHEAD)
        sum_0 = simd.add_i32(sum_0, simd.pair_products(simd.load_low_halves(packed), simd.load_i16(x)))
        sum_1 = simd.add_i32(sum_1, simd.pair_products(simd.load_low_halves(packed + 16), simd.load_i16(x + 32)))
        packed += 32
        x += 64
    tail = np.int32(0)
    while packed < end:
        code = ((np.int32(simd.int8_at(packed)) & 15) ^ 8) - 8
        tail = np.int32(tail + 16 * code * np.int32(simd.int16_at(x)))
        packed += 1
        x += 2
    return simd.add_i32(sum_0, sum_1), tail


@jit()
def _dot_high(x, packed, count):
    sum_0 = sum_1 = simd.zero_int32()
    end = packed + count
    while packed + 32 <= end:
        sum_0 = simd.add_i32(sum_0, simd.pair_products(simd.load_high_halves(packed), simd.load_i16(x)))
        sum_1 = simd.add_i32(sum_1, simd.pair_products(simd.load_high_halves(packed + 16), simd.load_i16(x + 32)))
        packed += 32
        x += 64
    tail = np.int32(0)
    while packed < end:
        tail = np.int32(tail + (np.int32(simd.int8_at(packed)) & -16) * np.int32(simd.int16_at(x)))
        packed += 1
        x += 2
    return simd.add_i32(sum_0, sum_1), tail
