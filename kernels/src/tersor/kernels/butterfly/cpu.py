"""Butterflies on the CPU: stages of one shape, each of which reads and writes in order."""

import numpy as np
import torch
from numba import prange
from torch import Tensor

from tersor.kernels.butterfly import compute_dtype, shuffled
from tersor.kernels.cpu import REORDER, array, jit, num_threads


def butterfly(x: Tensor, angles: Tensor, transpose: bool = False) -> Tensor:
    dtype, block = compute_dtype(x), 2 ** len(angles)
    if block == 1 or x.numel() == 0:
        return x.clone(memory_format=torch.contiguous_format)
    y = torch.empty(x.shape, dtype=dtype)
    blocks = [array(t.view(-1, block)) for t in (x.to(dtype).contiguous(), y)]
    cos, sin = (array(t) for t in shuffled(angles.to(dtype)))
    threads = num_threads(y.nbytes)
    if threads == 1:
        _transform(*blocks, cos, sin, transpose, 0, len(blocks[0]))
    else:
        _transform_in_parallel(*blocks, cos, sin, transpose, threads)
    return y.to(x.dtype)


@jit()
def _transform(x, y, cos, sin, transpose, start, stop):
    stages = cos.shape[1]
    ping, pong = np.empty(x.shape[1], x.dtype), np.empty(x.shape[1], x.dtype)
    for i in range(start, stop):
        block = i % len(cos)
        source = x[i]
        for k in range(stages):
            target = y[i] if k == stages - 1 else ping if k % 2 else pong
            if transpose:
                _turn_back(source, target, cos[block, stages - 1 - k], sin[block, stages - 1 - k])
            else:
                _turn(source, target, cos[block, k], sin[block, k])
            source = target


@jit(fastmath=REORDER)
def _turn(x, y, cos, sin):
    half = cos.size
    for p in range(half):
        a, b = x[2 * p], x[2 * p + 1]
        y[p] = cos[p] * a - sin[p] * b
        y[half + p] = sin[p] * a + cos[p] * b


@jit(fastmath=REORDER)
def _turn_back(x, y, cos, sin):
    half = cos.size
    for p in range(half):
        a, b = x[p], x[half + p]
        y[2 * p] = cos[p] * a + sin[p] * b
        y[2 * p + 1] = cos[p] * b - sin[p] * a


@jit(parallel=True)
def _transform_in_parallel(x, y, cos, sin, transpose, threads):
    blocks = len(x)
    for t in prange(threads):
        _transform(x, y, cos, sin, transpose, t * blocks // threads, (t + 1) * blocks // threads)
