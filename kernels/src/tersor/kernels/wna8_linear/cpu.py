"""Products of packed weights with activations of 8 bits on the CPU.

Up to 16 rows of x: one row of codes after the other becomes bytes in the cache; 32 products of bytes, and their sums
by twos, are one instruction. More rows, and groups that are no multiple of 32: `dequant_matmul`, with x in float32.
"""

# pyright: reportCallIssue=false
# (an intrinsic is called without its first argument)

import numpy as np
import torch
from numba import prange
from torch import Tensor

from tersor.kernels import simd, simd512
from tersor.kernels.bits.cpu import unpack_row
from tersor.kernels.cpu import jit, num_threads, words
from tersor.kernels.dequant_matmul.cpu import dequant_matmul
from tersor.kernels.dispatch import Declined
from tersor.kernels.wna8_linear import avx512

_f32 = np.float32

# beyond, decoding to float32 pays
_MAX_ROWS = 16


def wna8_linear(
    x: Tensor, x_scale: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor, bits: int, group_size: int
) -> Tensor | Declined:
    if torch.float64 in (x_scale.dtype, scale.dtype):
        return Declined("float64")
    n, out = x.shape[-1], len(packed)
    if not (x.numel() and out):
        return x_scale.new_zeros(*x.shape[:-1], out)
    num_rows = x.numel() // n
    groups = n // group_size
    if num_rows <= _MAX_ROWS and avx512.serves(n, bits, group_size) and simd512.available("vnni"):
        return _wna8_linear_512(x, x_scale, packed, scale, zero_point, bits, group_size)
    grouped = x.reshape(num_rows, groups, group_size)
    x_scale_of_groups = x_scale.reshape(num_rows, -1).float().expand(num_rows, groups).contiguous()
    if num_rows > _MAX_ROWS or group_size % 32 or not simd.available():
        rounded = (grouped * x_scale_of_groups[..., None]).view(*x.shape)
        return dequant_matmul(rounded, packed, scale, zero_point, bits, group_size).to(x_scale.dtype)
    sums = grouped.sum(-1, dtype=torch.int32) * x_scale_of_groups
    # products of two bytes, and sums of two of them, fit in 16 bits for codes of up to 7
    x, packed = (x.to(torch.int16) if bits == 8 else x).contiguous(), packed.contiguous()
    scale, zero_point = scale.float().contiguous(), zero_point.float().contiguous()
    y = torch.empty(*x.shape[:-1], out, dtype=torch.float32)
    # addresses: the tensors live until the end of this function
    addresses = [tensor.data_ptr() for tensor in (x, x_scale_of_groups, sums, y, packed, scale, zero_point)]
    operands = *addresses, *words((n + 7) // 8, packed), num_rows, out, n, groups, bits
    threads = num_threads(packed.numel())
    # with one row of x, codes of up to 4 bits are multiplied where they are
    narrowest = bits & -bits
    in_place = True if num_rows == 1 and bits <= 4 and narrowest * n // 8 % group_size == 0 else None
    if threads == 1:
        _multiply(*operands, in_place, 0, out)
    else:
        _multiply_in_parallel(*operands, in_place, threads)
    return y.to(x_scale.dtype)


def _wna8_linear_512(x, x_scale, packed, scale, zero_point, bits, group_size) -> Tensor:
    n, out = x.shape[-1], len(packed)
    y = torch.empty(*x.shape[:-1], out, dtype=torch.float32)
    x, x_scale_of_groups, packed = x.contiguous(), x_scale.float().contiguous(), packed.contiguous()
    scale, zero_point = scale.float().contiguous(), zero_point.float().contiguous()
    # addresses: the tensors live until the end of this function
    of_scales = x_scale_of_groups.data_ptr(), 4 if x_scale.shape[-1] > 1 else 0, 4 * x_scale.shape[-1]
    weight = packed.data_ptr(), scale.data_ptr(), zero_point.data_ptr()
    # a tuple is a number that Numba knows when it compiles
    sizes = x.numel() // n, out, n, n // group_size, (0,) * bits
    operands = x.data_ptr(), of_scales, y.data_ptr(), weight, *sizes
    threads = num_threads(packed.numel())
    if threads == 1:
        _multiply_512(*operands)
    else:
        _multiply_512_in_parallel(*operands, threads)
    return y if x_scale.dtype == y.dtype else y.to(x_scale.dtype)


@jit(parallel=True)
def _multiply_in_parallel(
    x, x_scale, sums, y, packed, scale, zero_point, lanes, words, num_rows, out, n, groups, bits, in_place, threads
):
    for t in prange(threads):
        start, stop = t * out // threads, (t + 1) * out // threads
        _multiply(
            x,
            x_scale,
            sums,
            y,
            packed,
            scale,
            zero_point,
            lanes,
            words,
            num_rows,
            out,
            n,
            groups,
            bits,
            in_place,
            start,
            stop,
        )


@jit()
def _multiply(
    x, x_scale, sums, y, packed, scale, zero_point, lanes, words, num_rows, out, n, groups, bits, in_place, start, stop
):
    # so many bytes of sums of two products fit in int16
    most = np.int64(32 * (32767 // (256 * ((1 << bits) - 1))))
    x_nbytes = 2 * n if bits == 8 else n
    buffer = np.empty(n // words.itemsize, words.dtype)
    decoded = np.int64(buffer.ctypes.data)
    for row in range(start, stop):
        scales, zeros = scale + 4 * groups * row, zero_point + 4 * groups * row
        codes = packed + n // 8 * bits * row
        if in_place is None and bits < 8:
            unpack_row(words[row], buffer, bits, lanes)
            codes = decoded
        for m in range(num_rows):
            if in_place is not None:
                product = _dot_fields(codes, x, scales, x_scale, bits, n, groups, most)
            else:
                product = _dot_bytes(
                    codes, x + x_nbytes * m, scales, x_scale + 4 * groups * m, n // groups, groups, most
                )
            offset = _offset(scales, zeros, sums + 4 * groups * m, groups)
            simd.set_float32(y + 4 * (m * out + row), product - offset)


@jit(parallel=True)
def _multiply_512_in_parallel(x, x_scale, y, weight, num_rows, out, n, groups, bits, threads):
    sums = _sums(x, x_scale, num_rows, n, groups)
    for t in prange(threads):
        _multiply_512_rows(
            x, x_scale, sums, y, weight, num_rows, out, n, groups, bits, t * out // threads, (t + 1) * out // threads
        )


@jit()
def _multiply_512(x, x_scale, y, weight, num_rows, out, n, groups, bits):
    sums = _sums(x, x_scale, num_rows, n, groups)
    _multiply_512_rows(x, x_scale, sums, y, weight, num_rows, out, n, groups, bits, 0, out)


@jit()
def _sums(x, x_scale, num_rows, n, groups):
    """Of each group of x, which zero points multiply."""
    sums, (at, step, stride) = np.empty((num_rows, groups), _f32), x_scale
    for m in range(num_rows):
        for group in range(groups):
            total = avx512.sum_of_bytes(x + m * n + group * (n // groups), n // groups)
            sums[m, group] = _f32(total) * simd.float32_at(at + stride * m + step * group)
    return sums


@jit()
def _multiply_512_rows(x, x_scale, sums, y, weight, num_rows, out, n, groups, bits, start, stop):
    (packed, scale, zero_point), (at, step, stride) = weight, x_scale
    row_nbytes, group_size, in_fours = n // 8 * len(bits), n // groups, num_rows // 4 * 4
    sums_at = np.int64(sums.ctypes.data)
    for row in range(start, stop, 2):
        # of an odd number of rows, the last goes with itself
        other = min(row + 1, stop - 1)
        codes_0, codes_1 = packed + row_nbytes * row, packed + row_nbytes * other
        scale_0, scale_1 = scale + 4 * groups * row, scale + 4 * groups * other
        zeros_0, zeros_1 = zero_point + 4 * groups * row, zero_point + 4 * groups * other
        for m in range(0, in_fours, 4):
            products = avx512.dot_2_by_4(
                codes_0,
                codes_1,
                x + n * m,
                scale_0,
                scale_1,
                zeros_0,
                zeros_1,
                at + stride * m,
                step,
                stride,
                sums_at + 4 * groups * m,
                n,
                group_size,
                bits,
            )
            for i in range(4):
                simd.set_float32(y + 4 * ((m + i) * out + row), products[i])
                simd.set_float32(y + 4 * ((m + i) * out + other), products[4 + i])
        for m in range(in_fours, num_rows):
            of_x = at + stride * m, step, sums_at + 4 * groups * m
            product = avx512.dot(codes_0, x + n * m, scale_0, zeros_0, *of_x, n, group_size, bits)
            simd.set_float32(y + 4 * (m * out + row), product)
            if other > row:
                product = avx512.dot(codes_1, x + n * m, scale_1, zeros_1, *of_x, n, group_size, bits)
                simd.set_float32(y + 4 * (m * out + other), product)


@jit()
def _dot_fields(packed, x, scale, x_scale, bits, n, groups, most):
    """Of codes of 1 to 4 bits in all fields of the bytes, one field after the other."""
    group_size, product = n // groups, simd.splat(_f32(0))
    field = (bits & -bits) * n // 8
    for f in range(n // field):
        for start in range(0, field, group_size):
            if bits == 3:
                # the lower two in one plane, the highest in another
                low = packed + f % 2 * field + start
                dot = _dot_group_of_3_bits(low, packed + 2 * field + start, x, group_size, f // 2 * 2, f, most)
            else:
                dot = _dot_group(packed + start, x, group_size, f * bits, (1 << bits) - 1, most)
            product = simd.fma(simd.to_f32(dot), _scale(scale, x_scale), product)
            x += group_size
            scale += 4
            x_scale += 4
    return simd.total(product)


@jit()
def _dot_group_of_3_bits(low, high, x, count, low_shift, high_shift, most):
    total, end = simd.zero_int32(), low + count
    while low < end:
        part, stop = simd.zero_int16(), min(low + most, end)
        while low < stop:
            upper = simd.shift_and_mask(simd.load_u8(high), high_shift, 1)
            upper = simd.add_u8(upper, upper)
            codes = simd.add_u8(simd.add_u8(upper, upper), simd.shift_and_mask(simd.load_u8(low), low_shift, 3))
            part = simd.add_i16(part, simd.byte_products(codes, simd.load_u8(x)))
            low += 32
            high += 32
            x += 32
        total = simd.add_i32(total, simd.pair_sums(part))
    return total


@jit()
def _dot_bytes(codes, x, scale, x_scale, group_size, groups, most):
    product = simd.splat(_f32(0))
    for _ in range(groups):
        if most > 0:
            dot = _dot_group(codes, x, group_size, None, None, most)
            x += group_size
        else:
            dot = _dot_group_of_8_bits(codes, x, group_size)
            x += 2 * group_size
        product = simd.fma(simd.to_f32(dot), _scale(scale, x_scale), product)
        codes += group_size
        scale += 4
        x_scale += 4
    return simd.total(product)


@jit()
def _scale(scale, x_scale):
    return simd.splat(simd.float32_at(scale) * simd.float32_at(x_scale))


@jit()
def _offset(scale, zero_point, sums, groups):
    """sum_g scale_g zero_point_g sums_g."""
    total, end = simd.splat(_f32(0)), scale + 4 * groups
    while scale + 32 <= end:
        factor = simd.mul(simd.load_f32(scale), simd.load_f32(zero_point))
        total = simd.fma(factor, simd.load_f32(sums), total)
        scale += 32
        zero_point += 32
        sums += 32
    offset = simd.total(total)
    while scale < end:
        offset += simd.float32_at(scale) * simd.float32_at(zero_point) * simd.float32_at(sums)
        scale += 4
        zero_point += 4
        sums += 4
    return offset


@jit()
def _dot_group(codes, x, count, shift, mask, most):
    """Sums of products of bytes of x with codes, in lanes: with bytes, or with what a mask leaves of them."""
    total, end = simd.zero_int32(), codes + count
    while codes < end:
        part_0 = part_1 = simd.zero_int16()
        stop = min(codes + most, end)
        while codes + 128 <= stop:
            part_0 = simd.add_i16(part_0, _products(codes, x, shift, mask))
            part_1 = simd.add_i16(part_1, _products(codes + 32, x + 32, shift, mask))
            part_0 = simd.add_i16(part_0, _products(codes + 64, x + 64, shift, mask))
            part_1 = simd.add_i16(part_1, _products(codes + 96, x + 96, shift, mask))
            codes += 128
            x += 128
        while codes < stop:
            part_0 = simd.add_i16(part_0, _products(codes, x, shift, mask))
            codes += 32
            x += 32
        total = simd.add_i32(total, simd.pair_sums(simd.add_i16(part_0, part_1)))
    return total


@jit()
def _products(codes, x, shift, mask):
    vector = simd.load_u8(codes)
    if shift is not None:
        vector = simd.shift_and_mask(vector, shift, mask)
    return simd.byte_products(vector, simd.load_u8(x))


@jit()
def _dot_group_of_8_bits(codes, x, count):
    """With x of 16 bits."""
    sum_0 = sum_1 = simd.zero_int32()
    end = codes + count
    while codes < end:
        sum_0 = simd.add_i32(sum_0, simd.pair_products(simd.load_u8_as_i16(codes), simd.load_i16(x)))
        sum_1 = simd.add_i32(sum_1, simd.pair_products(simd.load_u8_as_i16(codes + 16), simd.load_i16(x + 32)))
        codes += 32
        x += 64
    return simd.add_i32(sum_0, sum_1)
