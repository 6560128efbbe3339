"""Products with packed weights in vectors of 512 bits: codes stay where they are, and index a table in a register.

A vector holds 64 bytes of codes. Rotated, the codes of one field of every fourth byte (or second: bfloat16) stand in
the lowest bits of its lanes, where a look-up finds them; so x is packed in that order once per call. Weights in
float32 multiply x in float32; those in bfloat16, to which the codebook is rounded then, x in bfloat16.
"""

# pyright: reportCallIssue=false
# (an intrinsic is called without its first argument)

from typing import NamedTuple

import numpy as np
import torch
from numba import prange
from torch import Tensor

from tersor.kernels import simd, simd512
from tersor.kernels.cpu import jit, num_threads

_f32 = np.float32
_AHEAD = 2048  # bytes
_ITEMSIZE = {torch.float32: 4, torch.float16: 2, torch.bfloat16: -2}  # as simd.scalar_at has it


def multiply(
    x: Tensor,
    packed: Tensor,
    codebook: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bits: int,
    group_size: int,
    run: int,
    y: Tensor,
) -> None:
    """Write x W^T, (..., out), into `y`, float32 and contiguous.

    Args:
        x: (..., in), float32, or bfloat16 with a processor that multiplies it.
        run: bytes of a plane, a multiple of 64, that hold codes of one group in the same bits.
    """
    n, out, is_bf16 = x.shape[-1], len(packed), x.dtype == torch.bfloat16
    num_rows, groups, fields = x.numel() // n, n // group_size, 8 if bits == 3 else 8 // bits
    scale = (scale if scale.dtype in _ITEMSIZE else scale.float()).contiguous()
    x, packed, codebook = x.contiguous(), packed.contiguous(), codebook.to(x.dtype).contiguous()
    zero_point = None if zero_point is None else zero_point.float().contiguous()
    # rows of x are taken one by one, or four by four
    packed_x = torch.empty(num_rows if num_rows == 1 else -(-num_rows // 4) * 4, n, dtype=x.dtype)
    table, group_of_run = torch.empty(16, dtype=torch.int32), torch.empty(n // run, dtype=torch.int64)
    sums = torch.empty(num_rows if zero_point is not None else 0, groups, dtype=torch.float32)
    # only addresses from here on: the tensors live until the end of this function
    prepared = packed_x.data_ptr(), table.data_ptr(), group_of_run.data_ptr(), sums.data_ptr()
    _prepare(
        x.data_ptr(),
        codebook.data_ptr(),
        *prepared,
        num_rows,
        n,
        groups if zero_point is not None else 0,
        group_size,
        run,
        fields,
        bits,
        is_bf16,
    )
    zeros = 0 if zero_point is None else zero_point.data_ptr()
    weight = packed.data_ptr(), scale.data_ptr(), _ITEMSIZE[scale.dtype], zeros, n, groups, run
    # Numba compiles a function for each combination of types: a tuple is a number that it knows, None costs nothing
    operands = *prepared, num_rows, y.data_ptr(), out, weight, (0,) * bits, True if is_bf16 else None
    threads = num_threads(out * n)
    if threads == 1:
        _multiply(*operands, 0, out)
    else:
        _multiply_in_parallel(*operands, threads)


class _Weight(NamedTuple):
    """Addresses and sizes; Numba takes a plain tuple from Python much faster than a named one."""

    packed: int
    scale: int
    scale_size: int
    zeros: int  # 0: there are none
    n: int
    groups: int
    run: int


@jit()
def _prepare(
    x, codebook, packed_x, table, group_of_run, sums, num_rows, n, groups, group_size, run, fields, bits, is_bf16
):
    itemsize, codes = 2 if is_bf16 else 4, n // fields
    _pack(x, packed_x, num_rows, n, run, fields, itemsize)
    # the codebook, repeated until it fills a register
    for i in range(64 // itemsize):
        entry = codebook + itemsize * (i & ((1 << bits) - 1))
        if itemsize == 4:
            simd.set_int32(table + 4 * i, simd.int32_at(entry))
        else:
            simd.set_int16(table + 2 * i, simd.int16_at(entry))
    # (runs, fields): the group of each run of codes in each field
    for i in range(codes // run):
        for f in range(fields):
            simd.set_int64(group_of_run, (f * codes + i * run) // group_size)
            group_of_run += 8
    # of each group of x, which zero points multiply
    for i in range(num_rows * groups):
        total = _f32(0)
        for j in range(i * group_size, (i + 1) * group_size):
            total += simd.scalar_at(x, -2 if is_bf16 else 4, j)
        simd.set_float32(sums + 4 * i, total)


@jit()
def _pack(x, packed, num_rows, n, run, fields, itemsize):
    """In the order of the products: (rows / 4, runs, fields, run / 64, 4 bytes or 2, 4 rows, 64 bytes); or 1 for one row."""
    at_once, codes = 1 if num_rows == 1 else 4, n // fields
    for row in range(-(-num_rows // at_once) * at_once):
        target = packed + row // at_once * at_once * n * itemsize + row % at_once * 64
        # rows that are not there are others again: their products are left out
        first = min(row, num_rows - 1) * n
        for start in range(first, first + codes, run):
            for source in range(start, start + n, codes):
                for block in range(source, source + run, 64):
                    for k in range(itemsize):
                        if itemsize == 4:
                            for i in range(16):
                                simd.set_int32(target + 4 * i, simd.int32_at(x + 4 * (block + 4 * i + k)))
                        else:
                            for i in range(32):
                                simd.set_int16(target + 2 * i, simd.int16_at(x + 2 * (block + 2 * i + k)))
                        target += 64 * at_once


@jit(parallel=True)
def _multiply_in_parallel(x, table, runs, sums, num_rows, y, out, weight, bits, bf16, threads):
    for t in prange(threads):
        start, stop = t * out // threads, (t + 1) * out // threads
        _multiply(x, table, runs, sums, num_rows, y, out, weight, bits, bf16, start, stop)


@jit()
def _multiply(x, table, runs, sums, num_rows, y, out, weight, bits, bf16, start, stop):
    w = _Weight(*weight)
    row_nbytes, scale_nbytes = len(bits) * (w.n // 8), abs(w.scale_size) * w.groups
    if num_rows == 1:
        for row in range(start, stop):
            codes, scale = w.packed + row_nbytes * row, w.scale + scale_nbytes * row
            product = _dot(codes, scale, x, table, runs, w, bits, bf16)
            simd.set_float32(y + 4 * row, product - _offset(scale, row, sums, w))
        return
    x_nbytes, sums_nbytes = w.n * (4 if bf16 is None else 2), 4 * w.groups
    for row in range(start, stop, 2):
        # of an odd number of rows, the last goes with itself
        other = min(row + 1, stop - 1)
        codes, scale_0, scale_1 = (
            w.packed + row_nbytes * row,
            w.scale + scale_nbytes * row,
            w.scale + scale_nbytes * other,
        )
        codes_1 = w.packed + row_nbytes * other
        for m in range(0, num_rows, 4):
            products = _dot_2_by_4(codes, codes_1, scale_0, scale_1, x + x_nbytes * m, table, runs, w, bits, bf16)
            for i in range(min(4, num_rows - m)):
                of_x = sums + sums_nbytes * (m + i)
                simd.set_float32(y + 4 * ((m + i) * out + row), products[i] - _offset(scale_0, row, of_x, w))
                simd.set_float32(y + 4 * ((m + i) * out + other), products[4 + i] - _offset(scale_1, other, of_x, w))


@jit()
def _dot(low, scale, x, table, runs, w, bits, bf16):
    c, fields, table = w.n // 8, 8 if len(bits) == 3 else 8 // len(bits), simd512.load(table)
    product_0 = product_1 = simd512.zero()
    end = low + w.n // fields
    while low < end:
        _prefetch(low + _AHEAD, c, w.run, bits)
        for f in range(0, fields, 2):
            sums_0 = sums_1 = simd512.zero()
            for at in range(low, low + w.run, 64):
                planes = _planes(at, f, c, bits)
                for k in range(4 if bf16 is None else 2):
                    sums_0 = _fma(_values(planes, f, k, table, bits, bf16), x, sums_0, bf16)
                    x += 64
            for at in range(low, low + w.run, 64):
                planes = _planes(at, f + 1, c, bits)
                for k in range(4 if bf16 is None else 2):
                    sums_1 = _fma(_values(planes, f + 1, k, table, bits, bf16), x, sums_1, bf16)
                    x += 64
            product_0 = simd512.fma(sums_0, _scale(scale, w.scale_size, runs), product_0)
            product_1 = simd512.fma(sums_1, _scale(scale, w.scale_size, runs + 8), product_1)
            runs += 16
        low += w.run
    return simd512.total(product_0) + simd512.total(product_1)


@jit()
def _dot_2_by_4(low, low_1, scale_0, scale_1, x, table, runs, w, bits, bf16):
    """Products of two rows of weights with four rows of x: (row, row of x)."""
    c, fields, table = w.n // 8, 8 if len(bits) == 3 else 8 // len(bits), simd512.load(table)
    product_00 = product_01 = product_02 = product_03 = simd512.zero()
    product_10 = product_11 = product_12 = product_13 = simd512.zero()
    end, other = low + w.n // fields, low_1 - low
    while low < end:
        # of the next two rows
        _prefetch(low + 2 * len(bits) * c, c, w.run, bits)
        _prefetch(low + other + 2 * len(bits) * c, c, w.run, bits)
        for f in range(fields):
            sums_00 = sums_01 = sums_02 = sums_03 = sums_10 = sums_11 = sums_12 = sums_13 = simd512.zero()
            for at in range(low, low + w.run, 64):
                planes_0, planes_1 = _planes(at, f, c, bits), _planes(at + other, f, c, bits)
                for k in range(4 if bf16 is None else 2):
                    values = _values(planes_0, f, k, table, bits, bf16)
                    sums_00, sums_01 = _fma(values, x, sums_00, bf16), _fma(values, x + 64, sums_01, bf16)
                    sums_02, sums_03 = _fma(values, x + 128, sums_02, bf16), _fma(values, x + 192, sums_03, bf16)
                    values = _values(planes_1, f, k, table, bits, bf16)
                    sums_10, sums_11 = _fma(values, x, sums_10, bf16), _fma(values, x + 64, sums_11, bf16)
                    sums_12, sums_13 = _fma(values, x + 128, sums_12, bf16), _fma(values, x + 192, sums_13, bf16)
                    x += 256
            factor = _scale(scale_0, w.scale_size, runs)
            product_00, product_01 = simd512.fma(sums_00, factor, product_00), simd512.fma(sums_01, factor, product_01)
            product_02, product_03 = simd512.fma(sums_02, factor, product_02), simd512.fma(sums_03, factor, product_03)
            factor = _scale(scale_1, w.scale_size, runs)
            product_10, product_11 = simd512.fma(sums_10, factor, product_10), simd512.fma(sums_11, factor, product_11)
            product_12, product_13 = simd512.fma(sums_12, factor, product_12), simd512.fma(sums_13, factor, product_13)
            runs += 8
        low += w.run
    return (
        simd512.total(product_00),
        simd512.total(product_01),
        simd512.total(product_02),
        simd512.total(product_03),
        simd512.total(product_10),
        simd512.total(product_11),
        simd512.total(product_12),
        simd512.total(product_13),
    )


@jit()
def _prefetch(low, c, run, bits):
    """What comes later: rows of planes are too short for the machine to foresee."""
    for at in range(low, low + run, 64):
        simd.prefetch(at)
        if len(bits) == 3:
            simd.prefetch(at + c)
            simd.prefetch(at + 2 * c)


@jit()
def _planes(low, field, c, bits):
    """64 bytes of codes; of 3 bits, those of the lower two and of the highest."""
    if len(bits) == 3:
        return simd512.load(low + field % 2 * c), simd512.load(low + 2 * c)
    vector = simd512.load(low)
    return vector, vector


@jit()
def _values(planes, field, k, table, bits, bf16):
    """Weights of bytes k, k + 4, ... (or k, k + 2, ...) in a field; the lanes of an index may hold more above it."""
    if len(bits) == 3:
        lower = simd512.rotate_right(planes[0], field // 2 * 2 + 8 * k)
        index = simd512.blend(lower, simd512.rotate_right(planes[1], field + 8 * k - 2), 0x00030003)
    else:
        index = simd512.rotate_right(planes[0], field * len(bits) + 8 * k)
    if bf16 is not None:
        return simd512.lookup_bf16(table, index)
    return simd512.lookup_f32(table, index)


@jit()
def _fma(values, x, sums, bf16):
    if bf16 is not None:
        return simd512.dot_bf16(sums, values, simd512.load(x))
    return simd512.dot_f32(sums, values, simd512.load(x))


@jit()
def _scale(scale, itemsize, run):
    return simd512.splat(simd.scalar_at(scale, itemsize, simd.int64_at(run)))


@jit()
def _offset(scale, row, sums, w):
    """sum_g scale_g zero_point_g sums_g."""
    offset = _f32(0)
    if w.zeros:
        zeros = w.zeros + 4 * w.groups * row
        for group in range(w.groups):
            factor = simd.scalar_at(scale, w.scale_size, group) * simd.float32_at(zeros + 4 * group)
            offset += factor * simd.float32_at(sums + 4 * group)
    return offset
