"""Weighted sums on the CPU: run by run, so that a sum stays in the first-level cache until it is complete."""

from collections.abc import Sequence

import numpy as np
import torch
from numba import prange
from torch import Tensor

from tersor.kernels.cpu import REORDER, array, jit, num_threads
from tersor.kernels.dispatch import Declined
from tersor.kernels.weighted_sum import matrices

_f32, _u16, _u32 = np.float32, np.uint16, np.uint32

# a feature's bits times this are those of a float32: a shift by a variable would be done in 64 bits
_FACTORS = {torch.float32: (torch.uint32, 1), torch.bfloat16: (torch.uint16, 2**16)}
_RUN = 2048


def weighted_sum(weights: Tensor, history: Sequence[Tensor]) -> Tensor | Declined:
    newest = history[0]
    if newest.dtype not in _FACTORS:
        return Declined(f"{newest.dtype}")
    total = torch.empty(newest.shape, dtype=newest.dtype)
    if total.numel():
        bits, factor = _FACTORS[newest.dtype]
        weights, columns, by_column = matrices(weights.float(), newest.shape)
        features = tuple(array(feature.contiguous().view(-1, columns).view(bits)) for feature in history)
        out = array(total.view(-1, columns).view(bits))
        arguments = (array(weights.contiguous()), features, out, by_column, _u32(factor))
        runs = len(out) * -(-columns // _RUN)
        threads = num_threads(total.nbytes * len(history))
        if threads == 1:
            _sum(*arguments, 0, runs)
        else:
            _sum_in_parallel(*arguments, threads)
    return total


@jit()
def _sum(weights, history, out, by_column, factor, begin, end):
    columns = out.shape[1]
    runs = -(-columns // _RUN)
    buffer = np.empty(_RUN, np.float32)
    for run in range(begin, end):
        row, start = run // runs, run % runs * _RUN
        stop = min(start + _RUN, columns)
        # float32 is added up in place
        total = out[row, start:stop].view(np.float32) if factor == 1 else buffer[: stop - start]
        total.fill(0)
        for j in range(len(history)):
            if by_column:
                _add_products(total, weights[j, start:stop], history[j][row, start:stop], factor)
            else:
                _add_multiple(total, weights[j, row], history[j][row, start:stop], factor)
        if factor != 1:
            _round(total.view(np.uint32), out[row, start:stop])


@jit(fastmath=REORDER)
def _add_products(total, weights, bits, factor):
    for i in range(total.size):
        total[i] += weights[i] * _u32(_u32(bits[i]) * factor).view(_f32)


@jit(fastmath=REORDER)
def _add_multiple(total, weight, bits, factor):
    for i in range(total.size):
        total[i] += weight * _u32(_u32(bits[i]) * factor).view(_f32)


@jit()
def _round(total, bits):
    """To the nearest bfloat16, ties to even; NaN keeps a bit of its fraction."""
    for i in range(total.size):
        kept = total[i] >> _u32(16)
        nearest = _u32(total[i] + _u32(0x7FFF) + (kept & _u32(1))) >> _u32(16)
        is_nan = total[i] & _u32(0x7FFFFFFF) > _u32(0x7F800000)
        bits[i] = _u16(kept | _u32(0x40) if is_nan else nearest)


@jit(parallel=True)
def _sum_in_parallel(weights, history, out, by_column, factor, threads):
    runs = len(out) * -(-out.shape[1] // _RUN)
    for t in prange(threads):
        _sum(weights, history, out, by_column, factor, t * runs // threads, (t + 1) * runs // threads)
