"""The largest scores on the CPU: the k-th largest is found byte by byte, from histograms."""

import numpy as np
import torch
from numba import prange
from torch import Tensor

from tersor.kernels.cpu import array, jit, num_threads
from tersor.kernels.dispatch import Declined
from tersor.kernels.topk_mask import check_range

_i32, _u32 = np.int32, np.uint32


def topk_mask(scores: Tensor, k: Tensor) -> Tensor | Declined:
    if scores.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return Declined(f"scores are {scores.dtype}")
    check_range(scores, k)
    mask = torch.empty(scores.shape, dtype=torch.bool)
    if mask.numel():
        n = scores.shape[-1]
        k = k.long().expand(scores.shape[:-1]).flatten().contiguous()
        bits = scores.float().contiguous().view(torch.int32)
        arrays = [array(t) for t in (bits.view(-1, n), k, mask.view(-1, n))]
        threads = num_threads(bits.nbytes)
        if threads == 1:
            _rows(*arrays, 0, len(k))
        else:
            _all_rows(*arrays, threads)
    return mask


@jit()
def _rows(bits, k, mask, start, stop):
    keys, candidates = np.empty(bits.shape[1], np.uint32), np.empty(bits.shape[1], np.uint32)
    histogram = np.empty(256, np.int32)
    for row in range(start, stop):
        _ordered(bits[row], keys)
        _mask(keys, candidates, histogram, k[row], mask[row])


@jit()
def _ordered(bits, keys):
    """Unsigned integers in the order of the floats; both zeros are equal, NaN is the largest."""
    for i in range(bits.size):
        magnitude = _i32(bits[i] & _i32(0x7FFFFFFF))
        key = magnitude if bits[i] >= 0 else _i32(-magnitude)
        key = _i32(0x7FFFFFFF) if magnitude > _i32(0x7F800000) else key
        keys[i] = _u32(key) ^ _u32(0x80000000)


@jit()
def _mask(keys, candidates, histogram, k, mask):
    n = keys.size
    if k == 0:
        mask[:] = False
        return
    candidates[:] = keys
    for shift in (_u32(24), _u32(16), _u32(8), _u32(0)):
        histogram[:] = 0
        for i in range(n):
            histogram[candidates[i] >> shift & _u32(255)] += 1
        byte = 255
        while k > histogram[byte]:
            k -= histogram[byte]
            byte -= 1
        if histogram[byte] < n:  # only those with this byte can be the k-th largest
            kept = 0
            for i in range(n):
                candidates[kept] = candidates[i]
                kept += candidates[i] >> shift & _u32(255) == _u32(byte)
            n = kept
    # all candidates are equal now, and k of them are taken
    smallest = candidates[0]
    for i in range(keys.size):
        mask[i] = keys[i] > smallest
    i = 0
    while k > 0:
        if keys[i] == smallest:
            mask[i] = True
            k -= 1
        i += 1


@jit(parallel=True)
def _all_rows(bits, k, mask, threads):
    rows = len(bits)
    for t in prange(threads):
        _rows(bits, k, mask, t * rows // threads, (t + 1) * rows // threads)
