"""Bit packing on the CPU: 8 codes at a time, in the 8 bytes of a word."""

import numpy as np
import torch
from numba import prange
from torch import Tensor

from tersor.kernels.bits import check_range
from tersor.kernels.cpu import jit, num_threads, words


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    check_range(codes, bits)
    c = (codes.shape[-1] + 7) // 8
    packed = codes.new_empty(*codes.shape[:-1], c * bits)
    if packed.numel():
        if codes.shape[-1] % 8:
            codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % 8))
        codes = codes.contiguous()
        lanes, source, target = words(c, codes.view(-1, 8 * c), packed.view(-1, c * bits))
        _run(source, target, bits, lanes, True, codes.numel())
    return packed


def unpack_bits(packed: Tensor, bits: int, n: int) -> Tensor:
    c = (n + 7) // 8
    codes = packed.new_empty(*packed.shape[:-1], 8 * c)
    if codes.numel():
        lanes, source, target = words(c, packed.contiguous().view(-1, c * bits), codes.view(-1, 8 * c))
        _run(source, target, bits, lanes, False, codes.numel())
    return codes[..., :n].contiguous()


def _run(source, target, bits: int, lanes: np.uint64, packing: bool, nbytes: int) -> None:
    threads = num_threads(nbytes)
    if threads == 1:
        _rows(source, target, bits, lanes, packing, 0, len(source))
    else:
        _all_rows(source, target, bits, lanes, packing, threads)


@jit()
def _width(left):
    return 8 if left == 8 else 4 if left >= 4 else 2 if left >= 2 else 1


@jit()
def pack_row(codes, packed, bits, lanes):
    c = codes.size // 8  # in words or in bytes: both arrays are counted in the same
    shift = 0
    while shift < bits:
        width = _width(bits - shift)
        length, mask, down = width * c, lanes * np.uint64((1 << width) - 1), np.uint64(shift)
        # field by field, so that the inner loop is vector code
        for i in range(8 // width):
            up = np.uint64(i * width)
            if i == 0:
                for j in range(length):
                    packed[shift * c + j] = codes[j] >> down & mask
            else:
                for j in range(length):
                    packed[shift * c + j] |= (codes[i * length + j] >> down & mask) << up
        shift += width


@jit()
def unpack_row(packed, codes, bits, lanes):
    c = codes.size // 8
    shift = 0
    while shift < bits:
        width = _width(bits - shift)
        length, mask, up = width * c, lanes * np.uint64((1 << width) - 1), np.uint64(shift)
        for i in range(8 // width):
            down = np.uint64(i * width)
            if shift == 0:
                for j in range(length):
                    codes[i * length + j] = packed[j] >> down & mask
            else:
                for j in range(length):
                    codes[i * length + j] |= (packed[shift * c + j] >> down & mask) << up
        shift += width


@jit()
def _rows(source, target, bits, lanes, packing, start, stop):
    for row in range(start, stop):
        if packing:
            pack_row(source[row], target[row], bits, lanes)
        else:
            unpack_row(source[row], target[row], bits, lanes)


@jit(parallel=True)
def _all_rows(source, target, bits, lanes, packing, threads):
    rows = source.shape[0]
    for t in prange(threads):
        _rows(source, target, bits, lanes, packing, t * rows // threads, (t + 1) * rows // threads)
