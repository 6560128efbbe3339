"""Products of bit planes on the CPU: ones are counted, 256 bits at a time.

A pair of planes costs as much for every row of x, so for many rows, or without vectors, torch multiplies blocks of
decoded weights instead, in float32, in parts so short that sums are exact.
"""

# pyright: reportCallIssue=false
# (an intrinsic is called without its first argument)

import numpy as np
import torch
from numba import prange
from torch import Tensor

from tersor.kernels import simd
from tersor.kernels.bitplane_linear import plane_codes
from tersor.kernels.cpu import jit, num_threads
from tersor.kernels.dispatch import Declined

# rows times pairs of planes; beyond, decoding all weights once and a matrix product of torch's are faster
_MAX_PAIRS = 512
_BLOCK_ELEMENTS = 2**18  # decoded weights held at a time: 1 MiB


def bitplane_linear(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    group_size: int,
) -> Tensor | Declined:
    return _linear(x, x_scale, x_zero_point, weight, scale, zero_point, group_size)


def bipolar_linear(x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, group_size: int) -> Tensor | Declined:
    return _linear(x, x_scale, None, weight, scale, None, group_size)


def _linear(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    group_size: int,
) -> Tensor | Declined:
    if torch.float64 in (x_scale.dtype, scale.dtype):
        return Declined("float64")
    out, groups, bits, nbytes = weight.shape
    num_rows, x_bits = x_scale.numel(), x.shape[-2]
    y = torch.zeros(num_rows, out, dtype=torch.float32)
    if y.numel() and groups:
        x, weight = x.reshape(num_rows, groups, x_bits, nbytes), weight.contiguous()
        scales = x_scale.float().reshape(num_rows), scale.float().contiguous()
        zeros = None
        if x_zero_point is not None and zero_point is not None:
            zeros = x_zero_point.reshape(num_rows), zero_point.contiguous()
        if num_rows * bits * x_bits <= _MAX_PAIRS and simd.available():
            _count(x.contiguous(), weight, scales, zeros, group_size, y)
        else:
            _multiply_blocks(x, weight, scales, zeros, group_size, y)
    return y.view(*x_scale.shape, out).to(x_scale.dtype)


def _count(x, weight, scales, zeros, group_size, y) -> None:
    num_rows, groups, x_bits, nbytes = x.shape
    out, bits = len(weight), weight.shape[2]
    ones = torch.full((nbytes,), 255, dtype=torch.uint8)
    sums = torch.empty(num_rows, groups, dtype=torch.int64)
    # only addresses from here on: the tensors live until the end of this function
    corrections = None
    if zeros is not None:
        _sums(x.data_ptr(), ones.data_ptr(), sums.data_ptr(), num_rows * groups, x_bits, nbytes)
        corrections = zeros[0].contiguous().numpy(), zeros[1].view(-1).numpy(), sums.view(-1).numpy(), ones.data_ptr()
    of_x, of_weight = (x.data_ptr(), num_rows, x_bits), (weight.data_ptr(), bits)
    factors = scales[0].contiguous().numpy(), scales[1].view(-1).numpy()
    threads = num_threads(weight.numel())
    if threads == 1:
        _multiply(of_x, of_weight, factors, corrections, y.numpy(), groups, nbytes, group_size, 0, out)
    else:
        _multiply_in_parallel(of_x, of_weight, factors, corrections, y.numpy(), groups, nbytes, group_size, threads)


@jit()
def _multiply(of_x, of_weight, factors, corrections, y, groups, nbytes, group_size, start, stop):
    (x, num_rows, x_bits), (weight, bits), (x_scale, scale) = of_x, of_weight, factors
    # the product of the largest odd integers
    largest = ((1 << bits) - 1) * ((1 << x_bits) - 1)
    for row in range(start, stop):
        for group in range(groups):
            at = row * groups + group
            planes = weight + at * bits * nbytes
            if corrections is None:
                for m in range(num_rows):
                    different = _dot(planes, x + (m * groups + group) * x_bits * nbytes, bits, x_bits, nbytes, True)
                    y[m, row] += np.float32(group_size * largest - 2 * different) * scale[at]
            else:
                x_zero, zero, x_sums, ones = corrections
                w_sum, w_zero = _dot(planes, ones, bits, 1, nbytes, None), np.int64(zero[at])
                for m in range(num_rows):
                    of_row, z = m * groups + group, np.int64(x_zero[m])
                    both = _dot(planes, x + of_row * x_bits * nbytes, bits, x_bits, nbytes, None)
                    product = both - z * w_sum - w_zero * x_sums[of_row] + group_size * z * w_zero
                    y[m, row] += np.float32(product) * scale[at]
        for m in range(num_rows):
            y[m, row] *= x_scale[m]


@jit(parallel=True)
def _multiply_in_parallel(of_x, of_weight, factors, corrections, y, groups, nbytes, group_size, threads):
    out = y.shape[1]
    for t in prange(threads):
        first, last = t * out // threads, (t + 1) * out // threads
        _multiply(of_x, of_weight, factors, corrections, y, groups, nbytes, group_size, first, last)


@jit()
def _sums(x, ones, sums, count, x_bits, nbytes):
    for i in range(count):
        simd.set_int64(sums + 8 * i, _dot(ones, x + i * x_bits * nbytes, 1, x_bits, nbytes, None))


@jit()
def _dot(w, x, bits, x_bits, nbytes, xor):
    """sum_ij 2^(i + j) popcount(w_i & x_j), or of w_i ^ x_j."""
    total, rest, at = simd.zero_int64(), np.int64(0), 0
    while at + 32 <= nbytes:
        for shift in range(bits + x_bits - 1):
            # at most 8 pairs have this sum of i and j: their counts of at most 8 fit in bytes
            counts = simd.zero_bytes()
            for i in range(max(0, shift - x_bits + 1), min(bits, shift + 1)):
                w_i, x_j = simd.load_u8(w + i * nbytes + at), simd.load_u8(x + (shift - i) * nbytes + at)
                if xor is None:
                    counts = simd.add_u8(counts, simd.count_ones(simd.and_u8(w_i, x_j)))
                else:
                    counts = simd.add_u8(counts, simd.count_ones(simd.xor_u8(w_i, x_j)))
            total = simd.add_i64(total, simd.shift_left(simd.sums_of_eight(counts), shift))
        at += 32
    while at < nbytes:
        step = 8 if at + 8 <= nbytes else 1
        for i in range(bits):
            for j in range(x_bits):
                if step == 8:
                    w_word, x_word = simd.uint64_at(w + i * nbytes + at), simd.uint64_at(x + j * nbytes + at)
                else:
                    w_word, x_word = simd.uint8_at(w + i * nbytes + at), simd.uint8_at(x + j * nbytes + at)
                word = w_word & x_word if xor is None else w_word ^ x_word
                rest += simd.ones_of_word(word) << (i + j)
        at += step
    return simd.total_i64(total) + rest


def _multiply_blocks(x, weight, scales, zeros, group_size, y) -> None:
    (x_scale, scale), (out, groups, bits, _) = scales, weight.shape
    x_bits = x.shape[-2]

    def integers(planes: Tensor, zero: Tensor | None) -> Tensor:
        """(groups, rows, group_size)"""
        codes = plane_codes(planes, group_size).float()
        codes = 2 * codes - (2 ** planes.shape[-2] - 1) if zero is None else codes - zero[..., None]
        return codes.transpose(0, 1)

    X = integers(x, None if zeros is None else zeros[0][:, None])
    # products are that large at most, and sums of so many of them are integers that float32 holds
    exact = max(1, 2**24 // ((2**bits - 1) * (2**x_bits - 1)) if zeros is None else 2**24 // 255**2)
    step = max(1, _BLOCK_ELEMENTS // (groups * group_size))
    for start in range(0, out, step):
        rows = slice(start, start + step)
        W = integers(weight[rows], None if zeros is None else zeros[1][rows])
        # float64 holds all of their sums
        sums = sum((X[..., k : k + exact] @ W[..., k : k + exact].mT).double() for k in range(0, group_size, exact))
        y[:, rows] = (sums.float() * scale[rows].T[:, None]).sum(0) * x_scale[:, None]
