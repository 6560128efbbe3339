"""Products of packed codes with x of int8 in vectors of 512 bits: 64 products of bytes, and their sums by fours, are one
instruction (VNNI), which codes of 1 to 4 and of 8 bits enter where they are.
"""

# pyright: reportCallIssue=false
# (an intrinsic is called without its first argument)

import numpy as np

from tersor.kernels import simd, simd512
from tersor.kernels.cpu import jit

_f32 = np.float32

# bytes; rows of codes are too short for the machine to foresee what comes
_AHEAD = 2048


def serves(n: int, bits: int, group_size: int) -> bool:
    """Whether 64 neighbouring bytes always hold codes of one group in a field, and groups end where fields do."""
    narrowest = bits & -bits
    return bits in (1, 2, 3, 4, 8) and group_size % 64 == 0 and narrowest * n // 8 % group_size == 0


@jit()
def dot(packed, x, scale, zero_point, x_scale, x_scale_step, sums_of_x, n, group_size, bits):
    """The product of a row of weights with a row of x. `bits`: a tuple of so many numbers, whose length is known early."""
    of_zeros, groups = scale, n // group_size
    field = (len(bits) & -len(bits)) * n // 8
    product = simd512.zero()
    for f in range(n // field):
        low, high = _planes(packed, f, field, bits)
        for _ in range(field // group_size):
            sums, end = simd512.zero_i32(), low + group_size
            while low < end:
                simd.prefetch(low + _AHEAD)
                sums = simd512.dot_bytes(sums, _codes(low, high, f, bits), simd512.load(x))
                low += 64
                high += 64
                x += 64
            product = simd512.fma(simd512.to_f32(sums), _factor(scale, x_scale, f, bits), product)
            scale += 4
            x_scale += x_scale_step
    return _less_zeros(product, of_zeros, zero_point, sums_of_x, groups)


@jit()
def dot_2_by_4(
    packed_0,
    packed_1,
    x,
    scale_0,
    scale_1,
    zeros_0,
    zeros_1,
    x_scale,
    x_scale_step,
    x_scale_stride,
    sums_of_x,
    n,
    group_size,
    bits,
):
    """Products of two rows of weights with four rows of x: (row, row of x)."""
    of_zeros_0, of_zeros_1, groups = scale_0, scale_1, n // group_size
    field = (len(bits) & -len(bits)) * n // 8
    product_00 = product_01 = product_02 = product_03 = simd512.zero()
    product_10 = product_11 = product_12 = product_13 = simd512.zero()
    other = packed_1 - packed_0
    # where the next two rows are
    ahead = 2 * len(bits) * (n // 8)
    for f in range(n // field):
        low, high = _planes(packed_0, f, field, bits)
        for _ in range(field // group_size):
            sums_00 = sums_01 = sums_02 = sums_03 = simd512.zero_i32()
            sums_10 = sums_11 = sums_12 = sums_13 = simd512.zero_i32()
            end = low + group_size
            while low < end:
                simd.prefetch(low + ahead)
                simd.prefetch(low + other + ahead)
                codes_0 = _codes(low, high, f, bits)
                codes_1 = _codes(low + other, high + other, f, bits)
                x_0, x_1 = simd512.load(x), simd512.load(x + n)
                x_2, x_3 = simd512.load(x + 2 * n), simd512.load(x + 3 * n)
                sums_00, sums_01 = simd512.dot_bytes(sums_00, codes_0, x_0), simd512.dot_bytes(sums_01, codes_0, x_1)
                sums_02, sums_03 = simd512.dot_bytes(sums_02, codes_0, x_2), simd512.dot_bytes(sums_03, codes_0, x_3)
                sums_10, sums_11 = simd512.dot_bytes(sums_10, codes_1, x_0), simd512.dot_bytes(sums_11, codes_1, x_1)
                sums_12, sums_13 = simd512.dot_bytes(sums_12, codes_1, x_2), simd512.dot_bytes(sums_13, codes_1, x_3)
                low += 64
                high += 64
                x += 64
            at_0, at_1, at_2 = x_scale, x_scale + x_scale_stride, x_scale + 2 * x_scale_stride
            at_3 = at_2 + x_scale_stride
            product_00 = simd512.fma(simd512.to_f32(sums_00), _factor(scale_0, at_0, f, bits), product_00)
            product_01 = simd512.fma(simd512.to_f32(sums_01), _factor(scale_0, at_1, f, bits), product_01)
            product_02 = simd512.fma(simd512.to_f32(sums_02), _factor(scale_0, at_2, f, bits), product_02)
            product_03 = simd512.fma(simd512.to_f32(sums_03), _factor(scale_0, at_3, f, bits), product_03)
            product_10 = simd512.fma(simd512.to_f32(sums_10), _factor(scale_1, at_0, f, bits), product_10)
            product_11 = simd512.fma(simd512.to_f32(sums_11), _factor(scale_1, at_1, f, bits), product_11)
            product_12 = simd512.fma(simd512.to_f32(sums_12), _factor(scale_1, at_2, f, bits), product_12)
            product_13 = simd512.fma(simd512.to_f32(sums_13), _factor(scale_1, at_3, f, bits), product_13)
            scale_0 += 4
            scale_1 += 4
            x_scale += x_scale_step
    sums_0, sums_1, sums_2 = sums_of_x, sums_of_x + 4 * groups, sums_of_x + 8 * groups
    sums_3 = sums_2 + 4 * groups
    return (
        _less_zeros(product_00, of_zeros_0, zeros_0, sums_0, groups),
        _less_zeros(product_01, of_zeros_0, zeros_0, sums_1, groups),
        _less_zeros(product_02, of_zeros_0, zeros_0, sums_2, groups),
        _less_zeros(product_03, of_zeros_0, zeros_0, sums_3, groups),
        _less_zeros(product_10, of_zeros_1, zeros_1, sums_0, groups),
        _less_zeros(product_11, of_zeros_1, zeros_1, sums_1, groups),
        _less_zeros(product_12, of_zeros_1, zeros_1, sums_2, groups),
        _less_zeros(product_13, of_zeros_1, zeros_1, sums_3, groups),
    )


@jit()
def _less_zeros(product, scale, zero_point, sums, groups):
    """product - sum_g scale_g zero_point_g sums_g."""
    lanes = product
    end = scale + 4 * (groups - groups % 16)
    while scale < end:
        factor = simd512.mul(simd512.load_f32(scale), simd512.load_f32(zero_point))
        lanes = simd512.fma(simd512.negative(factor), simd512.load_f32(sums), lanes)
        scale += 64
        zero_point += 64
        sums += 64
    rest = _f32(0)
    end = scale + 4 * (groups % 16)
    while scale < end:
        rest += simd.float32_at(scale) * simd.float32_at(zero_point) * simd.float32_at(sums)
        scale += 4
        zero_point += 4
        sums += 4
    return simd512.total(lanes) - rest


@jit()
def sum_of_bytes(x, count):
    """The sum of `count` bytes with a sign, a multiple of 64."""
    sums, end, ones = simd512.zero_i32(), x + count, simd512.mask(simd512.ones(), 0x01010101)
    while x < end:
        sums = simd512.dot_bytes(sums, ones, simd512.load(x))
        x += 64
    return simd512.total_i32(sums)


@jit()
def _planes(packed, f, field, bits):
    """Where the codes of a field begin; of 3 bits, their lower two, and the highest."""
    if len(bits) == 3:
        return packed + f % 2 * field, packed + 2 * field
    return packed, packed


@jit()
def _codes(low, high, f, bits):
    """64 codes of a field as bytes; of 1, 2 and 4 bits where they stand in a byte, so 2^(f * bits) times as large."""
    vector = simd512.load(low)
    if len(bits) == 8:
        return vector
    if len(bits) == 3:
        upper = simd512.rotate_right(simd512.load(high), f - 2)
        return simd512.mask(simd512.blend(simd512.rotate_right(vector, f // 2 * 2), upper, 0x03030303), 0x07070707)
    return simd512.mask(vector, (0x01010101 * ((1 << len(bits)) - 1)) << (f * len(bits)))


@jit()
def _factor(scale, x_scale, f, bits):
    factor = simd.float32_at(scale) * simd.float32_at(x_scale)
    if len(bits) != 3:
        factor *= _f32(1) / _f32(1 << f * len(bits))
    return simd512.splat(factor)
