"""Byte planes on the CPU, in one pass over memory."""

import numpy as np
import torch
from numba import prange
from torch import Tensor

from tersor.kernels.cpu import array, jit, num_threads
from tersor.kernels.dispatch import Declined
from tersor.kernels.planes import word_dtype

_u8, _u16, _u32 = np.uint8, np.uint16, np.uint32


def plane_split(x: Tensor) -> tuple[Tensor, Tensor] | Declined:
    if x.dtype.itemsize == 1:
        return Declined("types of one byte are copied")
    first = torch.empty(x.shape, dtype=torch.uint8)
    rest = torch.empty(x.dtype.itemsize - 1, *x.shape, dtype=torch.uint8)
    _run(x.detach().contiguous().view(word_dtype(x.dtype)), first, rest, True)
    return first, rest


def plane_merge(first: Tensor, rest: Tensor, dtype: torch.dtype) -> Tensor | Declined:
    if dtype.itemsize == 1:
        return Declined("types of one byte are copied")
    word = torch.empty(first.shape, dtype=word_dtype(dtype))
    _run(word, first.contiguous(), rest.contiguous(), False)
    return word.view(dtype)


def _run(word: Tensor, first: Tensor, rest: Tensor, splitting: bool) -> None:
    words = array(word.view(-1)).view(_u16 if word.itemsize == 2 else _u32)
    planes = array(first.view(-1)), array(rest.reshape(word.itemsize - 1, -1))
    kernel, in_parallel = (_two, _all_two) if word.itemsize == 2 else (_four, _all_four)
    threads = num_threads(word.nbytes)
    if threads == 1:
        kernel(words, *planes, splitting, 0, words.size)
    else:
        in_parallel(words, *planes, splitting, threads)


@jit(nogil=True)
def _two(words, first, rest, splitting, start, stop):
    # indices that count from 0 cannot be negative, which would keep the loops from being vector code
    words, high, low = words[start:stop], first[start:stop], rest[0, start:stop]
    if splitting:
        for i in range(words.size):
            word = _u32(words[i])
            high[i] = _u8(word >> _u32(7))
            low[i] = _u8(word << _u32(1) | word >> _u32(15))
    else:
        for i in range(words.size):
            words[i] = _u16(_u32(high[i]) << _u32(7) | _u32(low[i]) >> _u32(1) | _u32(low[i]) << _u32(15))


@jit(nogil=True)
def _four(words, first, rest, splitting, start, stop):
    words, a, b = words[start:stop], first[start:stop], rest[0, start:stop]
    c, d = rest[1, start:stop], rest[2, start:stop]
    if splitting:
        for i in range(words.size):
            word = words[i]
            a[i] = _u8(word >> _u32(23))
            b[i] = _u8(word >> _u32(15))
            c[i] = _u8(word >> _u32(7))
            d[i] = _u8(word << _u32(1) | word >> _u32(31))
    else:
        for i in range(words.size):
            rotated = _u32(a[i]) << _u32(24) | _u32(b[i]) << _u32(16) | _u32(c[i]) << _u32(8) | _u32(d[i])
            words[i] = rotated >> _u32(1) | rotated << _u32(31)


@jit(parallel=True)
def _all_two(words, first, rest, splitting, threads):
    n = words.size
    for t in prange(threads):
        _two(words, first, rest, splitting, t * n // threads, (t + 1) * n // threads)


@jit(parallel=True)
def _all_four(words, first, rest, splitting, threads):
    n = words.size
    for t in prange(threads):
        _four(words, first, rest, splitting, t * n // threads, (t + 1) * n // threads)
