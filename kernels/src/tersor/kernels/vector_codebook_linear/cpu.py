"""Products with additive codebooks on the CPU.

Few rows of x: the products of each group of x with every entry of every codebook are computed once, by torch, and a
row of weights adds up those that its codes name. That pays while there are fewer entries than rows of weights. Else
blocks of weights are decoded, and torch multiplies them.
"""

import numpy as np
import torch
from numba import prange
from torch import Tensor

from tersor.kernels.cpu import REORDER, array, jit, num_threads
from tersor.kernels.dispatch import Declined

# beyond, a matrix product of torch's is faster
_MAX_ROWS = 4
_BLOCK_ELEMENTS = 2**19  # decoded weights held at a time: 2 MiB


def vector_codebook_linear(x: Tensor, codes: Tensor, codebooks: Tensor, scale: Tensor) -> Tensor | Declined:
    if x.dtype == torch.float64:
        return Declined("float64")
    (out, _, num_codebooks), (_, entries, group_size) = codes.shape, codebooks.shape
    if not (x.numel() and out):
        return x.new_zeros(*x.shape[:-1], out)
    n = x.shape[-1]
    rows = x.detach().reshape(-1, n).float().contiguous()
    codes, codebooks = codes.contiguous().view(out, -1), codebooks.float().contiguous()
    y = torch.empty(len(rows), out, dtype=torch.float32)
    threads = num_threads(codes.numel())
    if len(rows) <= _MAX_ROWS and num_codebooks * entries <= out:
        products = rows.view(-1, group_size) @ codebooks.view(-1, group_size).T  # (rows * groups, codebooks * entries)
        arguments = array(products.view(len(rows), -1, entries)), array(codes), array(y)
        if threads == 1:
            _add_up(*arguments, 0, out)
        else:
            _add_up_in_parallel(*arguments, threads)
    else:
        block = torch.empty(min(out, max(1, _BLOCK_ELEMENTS // n)), n, dtype=torch.float32)
        for start in range(0, out, len(block)):
            decoded = block[: out - start]
            arguments = array(codebooks), array(codes[start : start + len(decoded)]), array(decoded)
            if threads == 1:
                _decode(*arguments, 0, len(decoded))
            else:
                _decode_in_parallel(*arguments, threads)
            torch.matmul(rows, decoded.T, out=y[:, start : start + len(decoded)])
    return (y * scale.float()).to(x.dtype).view(*x.shape[:-1], out)


@jit(fastmath=REORDER)
def _add_up(products, codes, y, start, stop):
    mask = products.shape[2] - 1
    for row in range(start, stop):
        for m in range(len(products)):
            table, total = products[m], np.float32(0)
            for i in range(codes.shape[1]):
                total += table[i, codes[row, i] & mask]
            y[m, row] = total


@jit(parallel=True)
def _add_up_in_parallel(products, codes, y, threads):
    out = len(codes)
    for t in prange(threads):
        _add_up(products, codes, y, t * out // threads, (t + 1) * out // threads)


@jit()
def _decode(codebooks, codes, decoded, start, stop):
    num_codebooks, entries, group_size = codebooks.shape
    for row in range(start, stop):
        for group in range(codes.shape[1] // num_codebooks):
            begin = group * group_size
            for m in range(num_codebooks):
                entry = codebooks[m, codes[row, group * num_codebooks + m] & (entries - 1)]
                for i in range(group_size):
                    decoded[row, begin + i] = entry[i] if m == 0 else decoded[row, begin + i] + entry[i]


@jit(parallel=True)
def _decode_in_parallel(codebooks, codes, decoded, threads):
    rows = len(codes)
    for t in prange(threads):
        _decode(codebooks, codes, decoded, t * rows // threads, (t + 1) * rows // threads)
