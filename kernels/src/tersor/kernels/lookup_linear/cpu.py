"""Products with packed weights on the CPU: 32 codes at a time become weights in registers, by tables.

(Codes of more than 4 bits: see `wide`. With AVX-512 and groups of 64 and more: see `avx512`.)

The machine's tables have 16 entries of one byte, so a codebook of float32 makes four of them: 32 codes take four
look-ups and eight interleaves; two of the look-ups are left out where the lower bytes are zero everywhere (small
integers, e2m1, ternary).

One row of x: weights are multiplied where they are. Up to 16: two rows of weights are decoded into the cache and
multiplied with four rows of x at a time. More: blocks of weights are decoded, and torch multiplies them.
"""

# pyright: reportCallIssue=false
# (an intrinsic is called without its first argument)

import math
from typing import NamedTuple

import numpy as np
import torch
from numba import prange
from torch import Tensor

from tersor.kernels import simd, simd512
from tersor.kernels.bits.cpu import unpack_bits
from tersor.kernels.cpu import jit, num_threads
from tersor.kernels.dispatch import Declined
from tersor.kernels.lookup_linear import avx512, wide
from tersor.kernels.simd import FLOATS_ORDER

_f32 = np.float32

# beyond, a matrix product of torch's is faster
_MAX_ROWS = 16
# decoded weights held at a time: 2 MiB, or as much as x takes
_BLOCK_ELEMENTS = 2**19
_ITEMSIZE = {torch.float32: 4, torch.float16: 2, torch.bfloat16: -2}  # as simd.scalar_at has it


def lookup_linear(
    x: Tensor,
    packed: Tensor,
    codebook: Tensor,
    scale: Tensor,
    bits: int,
    group_size: int,
    zero_point: Tensor | None = None,
) -> Tensor | Declined:
    if x.dtype == torch.float64:
        return Declined("float64")
    n, out = x.shape[-1], packed.shape[0]
    if not (x.numel() and out):
        return x.new_zeros(*x.shape[:-1], out)
    dtype, shape = x.dtype, x.shape
    y = torch.empty(*shape[:-1], out, dtype=torch.float32)
    of_512_bits = bits <= 4 and x.numel() <= _MAX_ROWS * n and _run(n, bits, group_size) % 64 == 0
    if of_512_bits and simd512.available():
        x = x if dtype == torch.bfloat16 and simd512.available("bf16") else x.float()
        avx512.multiply(x, packed, codebook, scale, zero_point, bits, group_size, _run(n, bits, group_size), y)
        return y if dtype == torch.float32 else y.to(dtype)
    if dtype != torch.float32:
        x = x.float()
    x = x.contiguous()
    if bits > 4 and x.numel() <= _MAX_ROWS * n and simd.available():
        wide.multiply(x, packed, codebook, scale, zero_point, bits, y)
    elif has_vector_code(n, bits, group_size):
        _multiply_vectors(x, packed, codebook, scale, zero_point, bits, group_size, y)
    else:
        _multiply_blocks(x, packed, codebook, scale, zero_point, bits, group_size, y)
    return y if dtype == torch.float32 else y.to(dtype)


def has_vector_code(n: int, bits: int, group_size: int) -> bool:
    """Whether 32 neighbouring bytes always hold codes of one group in a field, or of two groups of 16."""
    return bits <= 4 and _run(n, bits, group_size) % 32 == 0 and simd.available()


def _run(n: int, bits: int, group_size: int) -> int:
    """Bytes of a plane that hold codes of one group (or of two groups of 16) in the same bits."""
    field = (bits & -bits) * ((n + 7) // 8)
    return math.gcd(field, 32 if group_size == 16 else group_size)


def _multiply_vectors(x, packed, codebook, scale, zero_point, bits, group_size, y) -> None:
    n, out = x.shape[-1], packed.shape[0]
    num_rows = x.numel() // n
    packed, codebook = packed.contiguous(), codebook.float().contiguous()
    scale, scale_size = _as_is(scale)
    zeros = None
    if zero_point is not None:
        zero_point, zero_size = _as_is(zero_point)
        zeros = zero_point.data_ptr(), zero_size
    # only addresses from here on: the tensors live until the end of this function
    weight = (
        packed.data_ptr(),
        codebook.data_ptr(),
        scale.data_ptr(),
        scale_size,
        bits,
        n,
        group_size,
        _run(n, bits, group_size),
    )
    # Numba compiles a function for each combination of types: what is None costs nothing in the loops
    options = zeros, True if _is_wide(codebook.data_ptr(), bits) else None, True if bits == 3 else None
    threads = num_threads(out * n)
    if num_rows <= _MAX_ROWS:
        if threads == 1:
            _multiply(x.data_ptr(), num_rows, y.data_ptr(), out, weight, *options)
        else:
            _multiply_in_parallel(x.data_ptr(), num_rows, y.data_ptr(), out, weight, *options, threads)
        return
    rows = x.view(num_rows, n // 32, 32)[..., FLOATS_ORDER].view(num_rows, n)
    block = torch.empty(min(out, max(1, max(_BLOCK_ELEMENTS, x.numel()) // n)), n, dtype=torch.float32)
    y = y.view(num_rows, out)
    for start in range(0, out, len(block)):
        decoded = block[: out - start]
        if threads == 1:
            _decode(decoded.data_ptr(), weight, *options, start, len(decoded))
        else:
            _decode_in_parallel(decoded.data_ptr(), weight, *options, start, len(decoded), threads)
        torch.matmul(rows, decoded.T, out=y[:, start : start + len(decoded)])


def _multiply_blocks(x, packed, codebook, scale, zero_point, bits, group_size, y) -> None:
    """In plain PyTorch: for rows and groups of other lengths, and for other processors."""
    n, out = x.shape[-1], packed.shape[0]
    x, y, codebook = x.view(-1, n), y.view(-1, out), codebook.float()
    step = max(1, _BLOCK_ELEMENTS // n)
    for rows in (slice(start, start + step) for start in range(0, out, step)):
        codes = unpack_bits(packed[rows], bits, n)
        # many times as fast as codebook[codes]
        weight = codebook.index_select(0, codes.flatten().int()).view(len(codes), -1, group_size)
        if zero_point is not None:
            weight -= zero_point[rows, :, None].float()
        weight *= scale[rows, :, None].float()
        torch.matmul(x, weight.flatten(-2).T, out=y[:, rows])


class _Weight(NamedTuple):
    """Addresses and sizes; Numba takes a plain tuple from Python much faster than a named one."""

    packed: int
    codebook: int
    scale: int
    scale_size: int
    bits: int
    n: int
    group_size: int
    run: int  # of bytes of a plane, of which each field of bits stays in one group (or two of 16)


def _as_is(tensor: Tensor) -> tuple[Tensor, int]:
    """A tensor that `simd.scalar_at` reads, and its item size there; no copy in float32 where it can do without."""
    if tensor.dtype not in _ITEMSIZE:
        tensor = tensor.float()
    return tensor.contiguous(), _ITEMSIZE[tensor.dtype]


@jit()
def _multiply(x, num_rows, y, out, weight, zeros, wide, planes):
    w = _Weight(*weight)
    _multiply_rows(_pack(x, num_rows, w.n), num_rows, y, out, _tables(w), w, zeros, wide, planes, 0, out)


@jit(parallel=True)
def _multiply_in_parallel(x, num_rows, y, out, weight, zeros, wide, planes, threads):
    w = _Weight(*weight)
    packed_x, tables = _pack(x, num_rows, w.n), _tables(w)
    for t in prange(threads):
        start, stop = t * out // threads, (t + 1) * out // threads
        _multiply_rows(packed_x, num_rows, y, out, tables, w, zeros, wide, planes, start, stop)


@jit()
def _decode(decoded, weight, zeros, wide, planes, first, count):
    w = _Weight(*weight)
    _decode_rows(decoded, _tables(w), w, zeros, wide, planes, first, 0, count)


@jit(parallel=True)
def _decode_in_parallel(decoded, weight, zeros, wide, planes, first, count, threads):
    w = _Weight(*weight)
    tables = _tables(w)
    for t in prange(threads):
        start, stop = t * count // threads, (t + 1) * count // threads
        _decode_rows(decoded, tables, w, zeros, wide, planes, first, start, stop)


@jit()
def _decode_rows(decoded, tables, w, zeros, wide, planes, first, start, stop):
    for i in range(start, stop):
        _row(first + i, None, decoded + 4 * w.n * i, tables, w, zeros, wide, planes)


@jit()
def _pack(x, num_rows, n):
    """Blocks of 32 columns in the order of the weights: (n / 32, 32) of one row, else (rows / 4, n / 32, 4, 32).

    So a product reads on and on, and rows with a length of 2^k do not evict each other from the cache.
    """
    width = 1 if num_rows == 1 else 4
    packed = np.zeros((-(-num_rows // width), n // 32, width, 4, 2, 4), _f32)
    for row in range(num_rows):
        for block in range(n // 32):
            target = packed[row // width, block, row % width]
            source = x + 4 * (row * n + 32 * block)
            for vector in range(4):
                for half in range(2):
                    for i in range(4):
                        target[vector, half, i] = simd.float32_at(source + 4 * (16 * half + 4 * vector + i))
    return packed


@jit()
def _tables(w):
    """(4, 32): table b holds byte b of each entry of the codebook, twice."""
    tables = np.zeros((4, 32), np.uint8)
    for code in range(1 << w.bits):
        entry = simd.bits_at(w.codebook + 4 * code)
        for b in range(4):
            tables[b, code] = tables[b, 16 + code] = entry >> 8 * b & 255
    return tables


@jit()
def _is_wide(codebook, bits):
    """Whether any entry needs its two lower bytes."""
    wide = False
    for code in range(1 << bits):
        wide |= simd.bits_at(codebook + 4 * code) & 0xFFFF != 0
    return wide


@jit()
def _multiply_rows(x, num_rows, y, out, tables, w, zeros, wide, planes, start, stop):
    if num_rows == 1:
        for row in range(start, stop):
            simd.set_float32(y + 4 * row, _row(row, _address(x), None, tables, w, zeros, wide, planes))
        return
    decoded = np.empty((2, w.n), _f32)
    for row in range(start, stop, 2):
        count = min(2, stop - row)
        for i in range(count):
            _row(row + i, None, _address(decoded) + 4 * w.n * i, tables, w, zeros, wide, planes)
        for m in range(0, num_rows, 4):
            sums = _dot_2_by_4(_address(decoded), _address(x) + 4 * w.n * m, w.n)
            for i in range(count):
                for j in range(min(4, num_rows - m)):
                    simd.set_float32(y + 4 * ((m + j) * out + row + i), sums[4 * i + j])


@jit()
def _row(row, x, decoded, tables, w, zeros, wide, planes):
    """The product of a row of weights with x; or, where x is None, the row itself, at the address `decoded`."""
    at = _address(tables)
    table_0, table_1, table_2, table_3 = (
        simd.load_u8(at),
        simd.load_u8(at + 32),
        simd.load_u8(at + 64),
        simd.load_u8(at + 96),
    )
    c = w.n // 8
    fields = 8 if planes is not None else 8 // w.bits
    # a vector spans two groups of 16
    groups = 2 if w.group_size == 16 else 1
    span = groups * w.group_size

    at = decoded if x is None else x
    zero_point, product = simd.splat(_f32(0)), simd.splat(_f32(0))
    byte_0, byte_1 = simd.zero_bytes(), simd.zero_bytes()
    group, left = row * (w.n // w.group_size), span
    for f in range(fields):
        low = w.packed + row * w.bits * c
        high, shift, mask = low + 2 * c, f * w.bits, (1 << w.bits) - 1
        if planes is not None:  # 3 bits: the lower two in one plane, the highest in another
            low, shift, mask = low + f % 2 * c, f // 2 * 2, 3
        for _ in range(w.n // fields // w.run):
            scale = _of_group(w.scale, w.scale_size, group, groups)
            if zeros is not None:
                zero_point = _of_group(zeros[0], zeros[1], group, groups)
            sum_0 = sum_1 = sum_2 = sum_3 = simd.splat(_f32(0))
            end = low + w.run
            while low < end:
                codes = simd.shift_and_mask(simd.load_u8(low), shift, mask)
                low += 32
                if planes is not None:
                    upper = simd.shift_and_mask(simd.load_u8(high), f, 1)
                    upper = simd.add_u8(upper, upper)
                    codes = simd.add_u8(codes, simd.add_u8(upper, upper))
                    high += 32
                if wide is not None:
                    byte_0, byte_1 = simd.lookup(table_0, codes), simd.lookup(table_1, codes)
                v_0, v_1, v_2, v_3 = simd.floats(
                    byte_0, byte_1, simd.lookup(table_2, codes), simd.lookup(table_3, codes)
                )
                if zeros is not None:
                    v_0, v_1 = simd.sub(v_0, zero_point), simd.sub(v_1, zero_point)
                    v_2, v_3 = simd.sub(v_2, zero_point), simd.sub(v_3, zero_point)
                if x is None:
                    simd.store_f32(at, simd.mul(v_0, scale))
                    simd.store_f32(at + 32, simd.mul(v_1, scale))
                    simd.store_f32(at + 64, simd.mul(v_2, scale))
                    simd.store_f32(at + 96, simd.mul(v_3, scale))
                else:
                    sum_0 = simd.fma(v_0, simd.load_f32(at), sum_0)
                    sum_1 = simd.fma(v_1, simd.load_f32(at + 32), sum_1)
                    sum_2 = simd.fma(v_2, simd.load_f32(at + 64), sum_2)
                    sum_3 = simd.fma(v_3, simd.load_f32(at + 96), sum_3)
                at += 128
            if x is not None:
                product = simd.fma(simd.add(simd.add(sum_0, sum_1), simd.add(sum_2, sum_3)), scale, product)
            left -= w.run
            if left == 0:
                group, left = group + groups, span
    return simd.total(product)


@jit()
def _address(array):
    return np.int64(array.ctypes.data)  # unsigned and signed integers would add up to a float


@jit()
def _of_group(address, itemsize, group, groups):
    first = simd.scalar_at(address, itemsize, group)
    return simd.halves(first, simd.scalar_at(address, itemsize, group + 1)) if groups == 2 else simd.splat(first)


@jit()
def _dot_2_by_4(a, x, n):
    """Products of two rows of weights with four rows of x: (row, row of x)."""
    a0x0 = a0x1 = a0x2 = a0x3 = a1x0 = a1x1 = a1x2 = a1x3 = simd.splat(_f32(0))
    for block in range(n // 32):
        for i in range(0, 128, 32):
            a0, a1 = simd.load_f32(a + 128 * block + i), simd.load_f32(a + 4 * n + 128 * block + i)
            at = x + 512 * block + i
            x0, x1, x2, x3 = (
                simd.load_f32(at),
                simd.load_f32(at + 128),
                simd.load_f32(at + 256),
                simd.load_f32(at + 384),
            )
            a0x0, a0x1 = simd.fma(a0, x0, a0x0), simd.fma(a0, x1, a0x1)
            a0x2, a0x3 = simd.fma(a0, x2, a0x2), simd.fma(a0, x3, a0x3)
            a1x0, a1x1 = simd.fma(a1, x0, a1x0), simd.fma(a1, x1, a1x1)
            a1x2, a1x3 = simd.fma(a1, x2, a1x2), simd.fma(a1, x3, a1x3)
    return (
        simd.total(a0x0),
        simd.total(a0x1),
        simd.total(a0x2),
        simd.total(a0x3),
        simd.total(a1x0),
        simd.total(a1x1),
        simd.total(a1x2),
        simd.total(a1x3),
    )
