"""Products with weights of 8 bits on the CPU.

Up to 12 rows of x (16 with vectors of 512 bits, 32 of int8): one row of weights after the other, while it is in the
cache, in vectors. More, or without vectors: torch multiplies blocks of decoded weights, in float32 for int8, too. Its
products are at most 2^14, so that sums of 1024 of them are exact.
"""

# pyright: reportCallIssue=false
# (an intrinsic is called without its first argument)

from collections.abc import Callable

import numpy as np
import torch
from numba import prange
from torch import Tensor

from tersor.kernels import simd, simd512
from tersor.kernels.cpu import jit, num_threads
from tersor.kernels.dispatch import Declined
from tersor.kernels.int8_linear import avx512, scaled

# beyond, a matrix product of torch's is faster
_MAX_ROWS, _MAX_ROWS_512, MAX_INT8_ROWS = 12, 16, 32
_BLOCK_ELEMENTS = 2**18  # decoded weights held at a time: 1 MiB
_EXACT = 1024
# bytes: the machine's own prefetching stops at the end of a page (measured: 8 % at 1024, less at 512 and 4096)
AHEAD = 1024


def int8_linear(x: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor | Declined:
    if x.dtype == torch.float64:
        return Declined("float64")
    out, n = weight.shape
    if not (x.numel() and out):
        return x.new_zeros(*x.shape[:-1], out)
    dtype, shape, num_rows = x.dtype, x.shape, x.numel() // n
    x, y = x.float().contiguous(), torch.empty(*shape[:-1], out, dtype=torch.float32)
    # Numba compiles a function for each of them
    wide = True if n // scale.shape[1] % 64 == 0 and simd512.available() else None
    if num_rows <= (_MAX_ROWS if wide is None else _MAX_ROWS_512) and simd.available():
        weight, scale = weight.contiguous(), scale.float().contiguous()
        zero_point = None if zero_point is None else zero_point.float().contiguous()
        addresses = (
            x.data_ptr(),
            weight.data_ptr(),
            scale.data_ptr(),
            zero_point.data_ptr() if zero_point is not None else 0,
        )
        threads, groups = num_threads(out * n), scale.shape[1]
        if threads == 1:
            _multiply(*addresses, y.data_ptr(), num_rows, out, n, groups, wide, 0, out)
        else:
            _multiply_in_parallel(*addresses, y.data_ptr(), num_rows, out, n, groups, wide, threads)
    else:
        x, rows_of_y = x.view(num_rows, n), y.view(num_rows, out)
        for rows in _blocks(out, n):
            decoded = weight[rows].float().unflatten(-1, (scale.shape[1], -1))
            if zero_point is not None:
                decoded -= zero_point[rows, :, None]
            decoded *= scale[rows, :, None]
            torch.matmul(x, decoded.flatten(-2).T, out=rows_of_y[:, rows])
    return y if dtype == torch.float32 else y.to(dtype)


def w8a8_linear(x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    out, n = weight.shape
    product = torch.zeros(*x.shape[:-1], out, dtype=torch.int32)
    if x.numel() and out:
        num_rows = x.numel() // n
        threads = num_threads(out * n)
        if num_rows <= MAX_INT8_ROWS and n % 64 == 0 and simd512.available("vnni"):
            x, weight = x.contiguous(), weight.contiguous()
            offsets = 128 * x.sum(-1, dtype=torch.int32).flatten()
            addresses = x.data_ptr(), weight.data_ptr(), offsets.data_ptr(), product.data_ptr()
            if threads == 1:
                _multiply_bytes(*addresses, num_rows, out, n, 0, out)
            else:
                _multiply_bytes_in_parallel(*addresses, num_rows, out, n, threads)
        elif num_rows <= MAX_INT8_ROWS and simd.available():
            words, weight = x.to(torch.int16).contiguous(), weight.contiguous()
            addresses = words.data_ptr(), weight.data_ptr(), product.data_ptr()
            if threads == 1:
                _multiply_int8(*addresses, num_rows, out, n, 0, out)
            else:
                _multiply_int8_in_parallel(*addresses, num_rows, out, n, threads)
        else:
            integer_product(x.reshape(num_rows, n), lambda rows: weight[rows], product.view(num_rows, out))
    return scaled(product, x_scale, scale)


def integer_product(x: Tensor, rows_of_weight: Callable[[slice], Tensor], product: Tensor) -> None:
    """Add x W^T to `product` (tokens, out), int32, for x (tokens, in) and some rows of W (rows, in) at a time, both int8."""
    floats, (_, out), n = x.float(), product.shape, x.shape[1]
    for rows in _blocks(out, n):
        weight = rows_of_weight(rows).float()
        for k in range(0, n, _EXACT):
            product[:, rows] += (floats[:, k : k + _EXACT] @ weight[:, k : k + _EXACT].T).int()


def _blocks(out: int, n: int) -> list[slice]:
    step = max(1, _BLOCK_ELEMENTS // n)
    return [slice(start, start + step) for start in range(0, out, step)]


@jit()
def _multiply(x, weight, scale, zero_point, y, num_rows, out, n, groups, wide, start, stop):
    # rows of x that are taken four by four
    in_fours = 0 if wide is None else num_rows // 4 * 4
    if wide is not None:
        for row in range(start, stop if in_fours else start, 2):
            # of an odd number of rows, the last goes with itself
            other = min(1, stop - 1 - row)
            zeros = zero_point + 4 * row * groups if zero_point else 0
            for m in range(0, in_fours, 4):
                products = avx512.dot_2_by_4(
                    x + 4 * m * n, n, weight + row * n, other, scale + 4 * row * groups, zeros, n // groups, groups
                )
                for i in range(4):
                    simd.set_float32(y + 4 * ((m + i) * out + row), products[i])
                    simd.set_float32(y + 4 * ((m + i) * out + row + other), products[4 + i])
    for row in range(start, stop if in_fours < num_rows else start):
        of_weight, of_scale = weight + row * n, scale + 4 * row * groups
        zeros = zero_point + 4 * row * groups if zero_point else 0
        for m in range(in_fours, num_rows):
            if wide is not None:
                product = avx512.dot(x + 4 * m * n, of_weight, of_scale, zeros, n // groups, groups)
            else:
                product = _dot(x + 4 * m * n, of_weight, of_scale, zeros, n // groups, groups)
            simd.set_float32(y + 4 * (m * out + row), product)


@jit(parallel=True)
def _multiply_in_parallel(x, weight, scale, zero_point, y, num_rows, out, n, groups, wide, threads):
    for t in prange(threads):
        first, last = t * out // threads, (t + 1) * out // threads
        _multiply(x, weight, scale, zero_point, y, num_rows, out, n, groups, wide, first, last)


@jit()
def _dot(x, weight, scale, zero_point, group_size, groups):
    product, tail = simd.splat(np.float32(0)), np.float32(0)
    zero = np.float32(0)
    for group in range(groups):
        s = simd.float32_at(scale + 4 * group)
        if zero_point:
            zero = simd.float32_at(zero_point + 4 * group)
        z = simd.splat(zero)
        sum_0 = sum_1 = sum_2 = sum_3 = simd.splat(np.float32(0))
        end = weight + group_size
        while weight + 32 <= end:
            simd.prefetch(weight + AHEAD)
            w_0, w_1 = simd.load_i8_as_f32(weight), simd.load_i8_as_f32(weight + 8)
            w_2, w_3 = simd.load_i8_as_f32(weight + 16), simd.load_i8_as_f32(weight + 24)
            if zero_point:
                w_0, w_1, w_2, w_3 = simd.sub(w_0, z), simd.sub(w_1, z), simd.sub(w_2, z), simd.sub(w_3, z)
            sum_0 = simd.fma(w_0, simd.load_f32(x), sum_0)
            sum_1 = simd.fma(w_1, simd.load_f32(x + 32), sum_1)
            sum_2 = simd.fma(w_2, simd.load_f32(x + 64), sum_2)
            sum_3 = simd.fma(w_3, simd.load_f32(x + 96), sum_3)
            weight += 32
            x += 128
        rest = np.float32(0)
        while weight < end:
            rest += (np.float32(simd.int8_at(weight)) - zero) * simd.float32_at(x)
            weight += 1
            x += 4
        tail += rest * s
        product = simd.fma(simd.add(simd.add(sum_0, sum_1), simd.add(sum_2, sum_3)), simd.splat(s), product)
    return simd.total(product) + tail


@jit()
def _multiply_bytes(x, weight, offsets, product, num_rows, out, n, start, stop):
    in_fours = num_rows // 4 * 4
    for row in range(start, stop):
        for m in range(0, in_fours, 4):
            products = avx512.dot_int8_by_4(x + m * n, n, weight + row * n)
            for i in range(4):
                sum_of_row = np.int32(products[i] - simd.int32_at(offsets + 4 * (m + i)))
                simd.set_int32(product + 4 * ((m + i) * out + row), sum_of_row)
        for m in range(in_fours, num_rows):
            sum_of_row = np.int32(avx512.dot_int8(x + m * n, weight + row * n, n) - simd.int32_at(offsets + 4 * m))
            simd.set_int32(product + 4 * (m * out + row), sum_of_row)


@jit(parallel=True)
def _multiply_bytes_in_parallel(x, weight, offsets, product, num_rows, out, n, threads):
    for t in prange(threads):
        first, last = t * out // threads, (t + 1) * out // threads
        _multiply_bytes(x, weight, offsets, product, num_rows, out, n, first, last)


@jit()
def _multiply_int8(x, weight, product, num_rows, out, n, start, stop):
    for row in range(start, stop):
        for m in range(num_rows):
            simd.set_int32(product + 4 * (m * out + row), _dot_int8(x + 2 * m * n, weight + row * n, n))


@jit(parallel=True)
def _multiply_int8_in_parallel(x, weight, product, num_rows, out, n, threads):
    for t in prange(threads):
        _multiply_int8(x, weight, product, num_rows, out, n, t * out // threads, (t + 1) * out // threads)


@jit()
def _dot_int8(x, weight, n):
    sum_0 = sum_1 = simd.zero_int32()
    end = weight + n
    while weight + 32 <= end:
        sum_0 = simd.add_i32(sum_0, simd.pair_products(simd.load_i8_as_i16(weight), simd.load_i16(x)))
        sum_1 = simd.add_i32(sum_1, simd.pair_products(simd.load_i8_as_i16(weight + 16), simd.load_i16(x + 32)))
        weight += 32
        x += 64
    rest = np.int32(0)
    while weight < end:
        rest = np.int32(rest + np.int32(simd.int8_at(weight)) * np.int32(simd.int16_at(x)))
        weight += 1
        x += 2
    return np.int32(simd.total_i32(simd.add_i32(sum_0, sum_1)) + rest)
