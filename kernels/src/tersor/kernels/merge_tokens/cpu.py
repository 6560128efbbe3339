"""Tokens merged on the CPU: one pass over the tokens, in their order."""

import numpy as np
import torch
from numba import prange
from torch import Tensor

from tersor.kernels.cpu import array, jit, num_threads
from tersor.kernels.merge_tokens import check_range, compute_dtype


def merge_tokens(x: Tensor, size: Tensor, place: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    check_range(place, num_tokens)
    wide = compute_dtype(x, size)
    batch, dim = len(x), x.shape[2:].numel()
    merged, total = torch.empty(batch, num_tokens, dim, dtype=wide), torch.zeros(batch, num_tokens, dtype=wide)
    tokens, sizes, places = x.to(wide).reshape(batch, x.shape[1], dim), size.to(wide), place.long()
    arrays = [array(t.contiguous()) for t in (tokens, sizes, places, merged, total)]
    first = _totals(*arrays[1:3], arrays[4])
    threads = num_threads(tokens.nbytes)
    if threads == 1:
        _merge(*arrays, first, 0, dim)
    else:
        _merge_in_parallel(*arrays, first, threads)
    return merged.to(x.dtype).view(batch, num_tokens, *x.shape[2:]), total


@jit()
def _totals(size, place, total):
    """The first token of each place, -1 where there is none; the sizes are added to `total`."""
    first = np.full(total.shape, -1)
    for b in range(len(place)):
        for i in range(place.shape[1]):
            j = place[b, i]
            if j >= 0:
                total[b, j] += size[b, i]
                if first[b, j] < 0:
                    first[b, j] = i
    return first


@jit()
def _merge(x, size, place, y, total, first, begin, end):
    for b in range(len(x)):
        for j in range(y.shape[1]):
            if total[b, j] == 0:
                y[b, j, begin:end] = 0
        for i in range(x.shape[1]):
            j = place[b, i]
            if j >= 0 and total[b, j] != 0:
                if first[b, j] == i:
                    y[b, j, begin:end] = x[b, i, begin:end]
                else:
                    _add(
                        y[b, j, begin:end],
                        x[b, i, begin:end],
                        x[b, first[b, j], begin:end],
                        size[b, i] / total[b, j],
                    )


@jit()
def _add(y, token, base, share):
    for c in range(y.size):
        y[c] += share * (token[c] - base[c])


@jit(parallel=True)
def _merge_in_parallel(x, size, place, y, total, first, threads):
    dim = x.shape[2]
    for t in prange(threads):
        _merge(x, size, place, y, total, first, t * dim // threads, (t + 1) * dim // threads)
