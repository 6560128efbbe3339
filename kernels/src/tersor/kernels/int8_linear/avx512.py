"""Products with weights of int8 in vectors of 512 bits: with x in float32, and with x of int8 (VNNI).

Its products of bytes take one of them without a sign, so weights are raised by 128, and 128 times the sum of x taken off.
"""

# pyright: reportCallIssue=false
# (an intrinsic is called without its first argument)

import numpy as np

from tersor.kernels import simd, simd512
from tersor.kernels.cpu import jit

_f32, _i32 = np.float32, np.int32

# bytes: the machine's own prefetching stops at the end of a page
_AHEAD = 2048
_PART = 128


@jit()
def dot(x, weight, scale, zero_point, group_size, groups):
    """The product of a row of weights with a row of x in float32; `zero_point` is 0 where there are none."""
    step = 4
    if groups == 1 and group_size % _PART == 0:
        # a short loop, whose end is foreseen, does not keep the next loads waiting (measured: a third of the time)
        step, groups, group_size = 0, group_size // _PART, _PART
    product, zero = simd512.zero(), _f32(0)
    for _ in range(groups):
        if zero_point:
            zero = simd.float32_at(zero_point)
            zero_point += step
        sums_0 = sums_1 = simd512.zero()
        end = weight + group_size
        while weight < end:
            simd.prefetch(weight + _AHEAD)
            w_0, w_1 = _floats(weight, zero, zero_point), _floats(weight + 16, zero, zero_point)
            w_2, w_3 = _floats(weight + 32, zero, zero_point), _floats(weight + 48, zero, zero_point)
            sums_0 = simd512.fma(w_0, simd512.load_f32(x), sums_0)
            sums_1 = simd512.fma(w_1, simd512.load_f32(x + 64), sums_1)
            sums_0 = simd512.fma(w_2, simd512.load_f32(x + 128), sums_0)
            sums_1 = simd512.fma(w_3, simd512.load_f32(x + 192), sums_1)
            weight += 64
            x += 256
        product = simd512.fma(simd512.add(sums_0, sums_1), simd512.splat(simd.float32_at(scale)), product)
        scale += step
    return simd512.total(product)


@jit()
def dot_2_by_4(x, n, weight, other, scale, zero_point, group_size, groups):
    """Products of two rows of weights with four of x, `n` long: (row, row of x). `other`: 1 if there is a second row."""
    product_00 = product_01 = product_02 = product_03 = simd512.zero()
    product_10 = product_11 = product_12 = product_13 = simd512.zero()
    zero_0 = zero_1 = _f32(0)
    for group in range(groups):
        if zero_point:
            zero_0 = simd.float32_at(zero_point + 4 * group)
            zero_1 = simd.float32_at(zero_point + 4 * (group + other * groups))
        sums_00 = sums_01 = sums_02 = sums_03 = simd512.zero()
        sums_10 = sums_11 = sums_12 = sums_13 = simd512.zero()
        end = weight + group_size
        while weight < end:
            x_0, x_1 = simd512.load_f32(x), simd512.load_f32(x + 4 * n)
            x_2, x_3 = simd512.load_f32(x + 8 * n), simd512.load_f32(x + 12 * n)
            w = _floats(weight, zero_0, zero_point)
            sums_00, sums_01 = simd512.fma(w, x_0, sums_00), simd512.fma(w, x_1, sums_01)
            sums_02, sums_03 = simd512.fma(w, x_2, sums_02), simd512.fma(w, x_3, sums_03)
            w = _floats(weight + other * n, zero_1, zero_point)
            sums_10, sums_11 = simd512.fma(w, x_0, sums_10), simd512.fma(w, x_1, sums_11)
            sums_12, sums_13 = simd512.fma(w, x_2, sums_12), simd512.fma(w, x_3, sums_13)
            weight += 16
            x += 64
        factor = simd512.splat(simd.float32_at(scale + 4 * group))
        product_00, product_01 = simd512.fma(sums_00, factor, product_00), simd512.fma(sums_01, factor, product_01)
        product_02, product_03 = simd512.fma(sums_02, factor, product_02), simd512.fma(sums_03, factor, product_03)
        factor = simd512.splat(simd.float32_at(scale + 4 * (group + other * groups)))
        product_10, product_11 = simd512.fma(sums_10, factor, product_10), simd512.fma(sums_11, factor, product_11)
        product_12, product_13 = simd512.fma(sums_12, factor, product_12), simd512.fma(sums_13, factor, product_13)
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
def _floats(weight, zero, zero_point):
    w = simd512.load_i8_as_f32(weight)
    if zero_point:
        w = simd512.sub(w, simd512.splat(zero))
    return w


@jit()
def dot_int8(x, weight, n):
    """The product of a row of weights with a row of x, both of int8, less 128 times the sum of x."""
    sums_0 = sums_1 = simd512.zero_i32()
    end = weight + n
    while weight + 128 <= end:
        simd.prefetch(weight + _AHEAD)
        simd.prefetch(weight + _AHEAD + 64)
        sums_0 = simd512.dot_bytes(sums_0, _raised(weight), simd512.load(x))
        sums_1 = simd512.dot_bytes(sums_1, _raised(weight + 64), simd512.load(x + 64))
        weight += 128
        x += 128
    if weight < end:
        sums_0 = simd512.dot_bytes(sums_0, _raised(weight), simd512.load(x))
    return _i32(simd512.total_i32(simd512.add_i32(sums_0, sums_1)))


@jit()
def dot_int8_by_4(x, n, weight):
    """The products with four rows of x, `n` long, less 128 times their sums."""
    sums_0 = sums_1 = sums_2 = sums_3 = simd512.zero_i32()
    for i in range(0, n, 64):
        simd.prefetch(weight + i + _AHEAD)
        w = _raised(weight + i)
        sums_0 = simd512.dot_bytes(sums_0, w, simd512.load(x + i))
        sums_1 = simd512.dot_bytes(sums_1, w, simd512.load(x + n + i))
        sums_2 = simd512.dot_bytes(sums_2, w, simd512.load(x + 2 * n + i))
        sums_3 = simd512.dot_bytes(sums_3, w, simd512.load(x + 3 * n + i))
    return (
        _i32(simd512.total_i32(sums_0)),
        _i32(simd512.total_i32(sums_1)),
        _i32(simd512.total_i32(sums_2)),
        _i32(simd512.total_i32(sums_3)),
    )


@jit()
def _raised(weight):
    return simd512.flip(simd512.load(weight), 0x80808080)
