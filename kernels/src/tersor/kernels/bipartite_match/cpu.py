"""Best matches on the CPU: torch multiplies blocks that stay in the cache, Numba looks for the largest in each row."""

import torch
from numba import prange
from torch import Tensor

from tersor.kernels.bipartite_match import holds_nan, nan_wins, unit
from tersor.kernels.cpu import REORDER, array, jit, num_threads

# similarities held at a time: 4 MiB in float32
_BLOCK_ELEMENTS = 2**20
# the largest is sought in runs of this many, then within its run
_RUN = 128


def bipartite_match(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    batch, n, m = *a.shape[:2], b.shape[1]
    a, b = unit(a), unit(b)
    score, index = a.new_zeros(batch, n), a.new_zeros(batch, n, dtype=torch.int64)
    if not a.numel() or not b.numel():
        return score, index
    in_a, in_b = holds_nan(a), holds_nan(b)
    if in_a.any() or in_b.any():
        a, b = a.nan_to_num(), b.nan_to_num()
    block = a.new_empty(min(max(_BLOCK_ELEMENTS, m), batch * n * m))
    samples = max(1, _BLOCK_ELEMENTS // (n * m))  # small matrices are multiplied several at a time
    rows = min(n, max(1, _BLOCK_ELEMENTS // m))
    for s in range(0, batch, samples):
        for r in range(0, n, rows):
            some = a[s : s + samples, r : r + rows]
            similarity = block[: some.shape[0] * some.shape[1] * m].view(*some.shape[:2], m)
            torch.bmm(some, b[s : s + samples].mT, out=similarity)
            best, at = score[s : s + samples, r : r + rows], index[s : s + samples, r : r + rows]
            arrays = [array(t) for t in (similarity.view(-1, m), best.view(-1), at.view(-1))]
            threads = num_threads(similarity.nbytes)
            if threads == 1:
                _largest(*arrays, 0, best.numel())
            else:
                _largest_in_parallel(*arrays, threads)
    return nan_wins(in_a, in_b, score, index)


@jit(fastmath=REORDER | {"nnan"})  # or the maximum is no vector code
def _maximum(values):
    largest = values[0]
    for j in range(values.size):
        largest = max(largest, values[j])
    return largest


@jit()
def _largest(similarity, score, index, start, stop):
    m = similarity.shape[1]
    for i in range(start, stop):
        row = similarity[i]
        best, at = _maximum(row[:_RUN]), 0
        for run in range(_RUN, m, _RUN):
            largest = _maximum(row[run : run + _RUN])
            if largest > best:
                best, at = largest, run
        while row[at] != best:
            at += 1
        score[i] = best
        index[i] = at


@jit(parallel=True)
def _largest_in_parallel(similarity, score, index, threads):
    rows = len(similarity)
    for t in prange(threads):
        _largest(similarity, score, index, t * rows // threads, (t + 1) * rows // threads)
