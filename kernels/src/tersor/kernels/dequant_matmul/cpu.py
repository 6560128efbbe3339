"""Products with packed weights on the CPU, without ever holding more than a few rows of weights.

Up to 4 bits codes are looked up in a codebook 0, 1, 2, ... wherever `lookup_linear` has vector code for it. Else, up to
8 rows of x, Numba decodes one row of weights at a time and multiplies it while it is in the cache; for more it decodes
blocks of rows, and torch multiplies them.
"""

import functools

import numpy as np
import torch
from numba import prange
from torch import Tensor

from tersor.kernels.bits.cpu import unpack_row
from tersor.kernels.cpu import REORDER, array, jit, num_threads, words
from tersor.kernels.dispatch import Declined
from tersor.kernels.lookup_linear.cpu import has_vector_code, lookup_linear

_f32, _i32 = np.float32, np.int32

# beyond, a matrix product of torch's is faster; x must also stay in the second-level cache
_MAX_ROWS, _MAX_ELEMENTS = 8, 2**16
# decoded weights held at a time: 2 MiB, or as much as x takes
_BLOCK_ELEMENTS = 2**19


def dequant_matmul(
    x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor, bits: int, group_size: int
) -> Tensor | Declined:
    if x.dtype == torch.float64:
        return Declined("float64")
    n, out = x.shape[-1], packed.shape[0]
    if bits <= 4 and has_vector_code(n, bits, group_size):
        return lookup_linear(x, packed, _levels(bits), scale, bits, group_size, zero_point)
    rows = x.reshape(x.shape[:-1].numel(), n).float().contiguous()
    num_rows = rows.shape[0]
    y = torch.zeros(num_rows, out, dtype=torch.float32)
    if num_rows and n and out:
        packed = packed.contiguous()
        scale, zero_point = scale.float().contiguous(), zero_point.float().contiguous()
        weight = (array(packed), *words((n + 7) // 8, packed), array(scale), array(zero_point))
        threads = num_threads(out * n)
        if num_rows == 1 or (num_rows <= _MAX_ROWS and rows.numel() <= _MAX_ELEMENTS):
            if threads == 1:
                _multiply(array(rows), array(y), weight, bits, group_size, 0, out)
            else:
                _multiply_in_parallel(array(rows), array(y), weight, bits, group_size, threads)
        else:
            block = torch.empty(min(out, max(1, max(_BLOCK_ELEMENTS, rows.numel()) // n)), n, dtype=torch.float32)
            for start in range(0, out, len(block)):
                decoded = block[: out - start]
                if threads == 1:
                    _decode_rows(array(decoded), weight, bits, group_size, start, 0, len(decoded))
                else:
                    _decode_in_parallel(array(decoded), weight, bits, group_size, start, threads)
                torch.matmul(rows, decoded.T, out=y[:, start : start + len(decoded)])
    return y.to(x.dtype).view(*x.shape[:-1], out)


@functools.cache
def _levels(bits: int) -> Tensor:
    with torch.inference_mode(False):
        return torch.arange(2.0**bits, dtype=torch.float32)


@jit(fastmath=REORDER)
def _multiply(x, y, weight, bits, group_size, start, stop):
    packed, lanes, words, scale, zero_point = weight
    n = x.shape[1]
    decoded = np.empty(n, np.float32)
    buffer = np.empty(-(-n // 8) * 8 // words.itemsize, words.dtype)
    for row in range(start, stop):
        if len(x) > 1:
            _decode(decoded, packed[row], words[row], lanes, scale[row], zero_point[row], bits, group_size, buffer)
            for m in range(len(x)):
                y[m, row] = _dot(decoded, x[m])
        else:
            codes = _codes(packed[row], words[row], lanes, bits, buffer)
            y[0, row] = _dot_codes(codes, scale[row], zero_point[row], group_size, x[0])


@jit(parallel=True)
def _multiply_in_parallel(x, y, weight, bits, group_size, threads):
    out = y.shape[1]
    for t in prange(threads):
        _multiply(x, y, weight, bits, group_size, t * out // threads, (t + 1) * out // threads)


@jit()
def _decode_rows(decoded, weight, bits, group_size, first, start, stop):
    packed, lanes, words, scale, zero_point = weight
    buffer = np.empty(-(-decoded.shape[1] // 8) * 8 // words.itemsize, words.dtype)
    for i in range(start, stop):
        row = first + i
        _decode(decoded[i], packed[row], words[row], lanes, scale[row], zero_point[row], bits, group_size, buffer)


@jit(parallel=True)
def _decode_in_parallel(decoded, weight, bits, group_size, first, threads):
    rows = len(decoded)
    for t in prange(threads):
        _decode_rows(decoded, weight, bits, group_size, first, t * rows // threads, (t + 1) * rows // threads)


@jit()
def _codes(packed, words, lanes, bits, buffer):
    if bits == 8:
        return packed
    unpack_row(words, buffer, bits, lanes)
    return buffer.view(np.uint8)


@jit()
def _decode(decoded, packed, words, lanes, scale, zero_point, bits, group_size, buffer):
    codes = _codes(packed, words, lanes, bits, buffer)
    for group in range(scale.size):
        begin, end = group * group_size, (group + 1) * group_size
        _affine(codes[begin:end], scale[group], zero_point[group], decoded[begin:end])


@jit()
def _affine(codes, scale, zero_point, decoded):
    for j in range(codes.size):
        decoded[j] = (_f32(_i32(codes[j])) - zero_point) * scale


@jit(fastmath=REORDER)
def _dot(a, b):
    total = _f32(0)
    for j in range(a.size):
        total += a[j] * b[j]
    return total


@jit(fastmath=REORDER)
def _dot_codes(codes, scale, zero_point, group_size, x):
    total = _f32(0)
    for group in range(scale.size):
        begin, end = group * group_size, (group + 1) * group_size
        total += scale[group] * _dot_group(codes[begin:end], zero_point[group], x[begin:end])
    return total


@jit(fastmath=REORDER)
def _dot_group(codes, zero_point, x):
    total = _f32(0)
    for j in range(codes.size):
        total += (_f32(_i32(codes[j])) - zero_point) * x[j]
    return total
