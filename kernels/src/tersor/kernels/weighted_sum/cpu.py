"""Weighted sums on the CPU: run by run, so that a sum stays in the first-level cache until it is complete."""

from collections.abc import Sequence

import numpy as np
import torch
from numba import prange, types
from numba.extending import overload
from torch import Tensor

from tersor.kernels.cpu import REORDER, array, jit, num_threads
from tersor.kernels.dispatch import Declined
from tersor.kernels.weighted_sum import matrices

_f32, _u16, _u32 = np.float32, np.uint16, np.uint32

# what Numba reads: it knows no bfloat16
_READ_AS = {torch.float32: torch.float32, torch.bfloat16: torch.uint16}
_RUN = 2048


def weighted_sum(weights: Tensor, history: Sequence[Tensor]) -> Tensor | Declined:
    newest = history[0]
    if newest.dtype not in _READ_AS:
        return Declined(f"{newest.dtype}")
    total = torch.empty(newest.shape, dtype=newest.dtype)
    if total.numel():
        weights, columns, by_column = matrices(weights.float(), newest.shape)
        dtype = _READ_AS[newest.dtype]
        features = tuple(array(feature.contiguous().view(dtype)).reshape(-1, columns) for feature in history)
        out = array(total.view(dtype)).reshape(-1, columns)
        arguments = (array(weights.contiguous()), features, out, by_column)
        runs = len(out) * -(-columns // _RUN)
        threads = num_threads(total.nbytes * len(history))
        if threads == 1:
            _sum(*arguments, 0, runs)
        else:
            _sum_in_parallel(*arguments, threads)
    return total


def _widened(x):
    """A float32 as it is, the bits of a bfloat16 as the float32 that they are."""


@overload(_widened)
def _(x):
    if isinstance(x, types.Float):
        return lambda x: x
    # a shift would be done in 64 bits
    return lambda x: _u32(_u32(x) * _u32(2**16)).view(_f32)


def _run_total(run, buffer):
    """Where a run is added up: in place if it is of float32."""


@overload(_run_total)
def _(run, buffer):
    if isinstance(run.dtype, types.Float):
        return lambda run, buffer: run
    return lambda run, buffer: buffer[: run.size]


def _store(total, run):
    """The total of a run, rounded if it is not there yet."""


@overload(_store)
def _(total, run):
    if isinstance(run.dtype, types.Float):
        return lambda total, run: None
    return lambda total, run: _round(total.view(_u32), run)


@jit()
def _sum(weights, history, out, by_column, begin, end):
    columns = out.shape[1]
    runs = -(-columns // _RUN)
    buffer = np.empty(_RUN, _f32)
    for run in range(begin, end):
        row, start = run // runs, run % runs * _RUN
        stop = min(start + _RUN, columns)
        total = _run_total(out[row, start:stop], buffer)
        total.fill(0)
        for j in range(len(history)):
            if by_column:
                _add_products(total, weights[j, start:stop], history[j][row, start:stop])
            else:
                _add_multiple(total, weights[j, row], history[j][row, start:stop])
        _store(total, out[row, start:stop])


@jit(fastmath=REORDER)
def _add_products(total, weights, feature):
    for i in range(total.size):
        total[i] += weights[i] * _widened(feature[i])


@jit(fastmath=REORDER)
def _add_multiple(total, weight, feature):
    for i in range(total.size):
        total[i] += weight * _widened(feature[i])


@jit()
def _round(total, bits):
    """To the nearest bfloat16, ties to even; NaN keeps a bit of its fraction."""
    for i in range(total.size):
        kept = total[i] >> _u32(16)
        nearest = _u32(total[i] + _u32(0x7FFF) + (kept & _u32(1))) >> _u32(16)
        is_nan = total[i] & _u32(0x7FFFFFFF) > _u32(0x7F800000)
        bits[i] = _u16(kept | _u32(0x40) if is_nan else nearest)


@jit(parallel=True)
def _sum_in_parallel(weights, history, out, by_column, threads):
    runs = len(out) * -(-out.shape[1] // _RUN)
    for t in prange(threads):
        _sum(weights, history, out, by_column, t * runs // threads, (t + 1) * runs // threads)
