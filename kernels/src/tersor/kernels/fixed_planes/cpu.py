"""P3 and P4 on the CPU: 64 codes at a time, then the escaped symbols one by one."""

# pyright: reportCallIssue=false
# (an intrinsic is called without its first argument)

import numpy as np
import torch
from torch import Tensor

from tersor.kernels.coding import nothing, padded, require
from tersor.kernels.coding.cpu import (
    aligned,
    bit_plane,
    histogram,
    pad,
    popcount,
    store_codes3,
    store_codes4,
    trailing_zeros,
    u64,
)
from tersor.kernels.cpu import array, jit
from tersor.kernels.fixed_planes import ANOTHER_SIDE, base_of, make_table, open_table

_u8 = np.uint8


def fixed_planes_encode(symbols: Tensor, bits: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    n = symbols.numel()
    if n == 0:
        return nothing(symbols)
    source = array(symbols.contiguous()).reshape(-1)
    base = base_of(histogram(source), bits)
    stream = torch.empty(padded(n) // 8 * bits, dtype=torch.uint8)
    planes = array(stream).view(np.uint64).reshape(-1, bits)
    source = pad(source, base)
    side = torch.empty(_encode_planes(source, _u8(base), planes), dtype=torch.uint8)
    _encode_side(source, planes, array(side))
    return make_table(symbols, bits, base), stream, side


def fixed_planes_decode(table: Tensor, stream: Tensor, side: Tensor, n: int) -> Tensor:
    bits, base = open_table(table, stream, n)
    symbols = torch.empty(padded(n), dtype=torch.uint8)
    planes = aligned(stream).view(np.uint64).reshape(-1, bits)
    require("fixed_planes_decode", _count_escapes(planes) == side.numel(), ANOTHER_SIDE)
    _decode(planes, array(side.contiguous()), _u8(base), array(symbols))
    return symbols[:n]


@jit(nogil=True)
def _escaped(masks):
    escaped = masks[0] & masks[1] & masks[2]
    return escaped & masks[3] if masks.size == 4 else escaped


@jit(nogil=True)
def _count_escapes(planes):
    total = u64(0)
    for group in range(len(planes)):
        total += popcount(_escaped(planes[group]))
    return total


@jit(nogil=True)
def _encode_planes(symbols, base, planes):
    """The number of escaped symbols."""
    escape = _u8((1 << planes.shape[1]) - 1)
    for group in range(len(planes)):
        address = u64(symbols.ctypes.data) + u64(64 * group)
        for j in range(planes.shape[1]):
            planes[group, j] = bit_plane(address, base, escape, _u8(1 << j))
    return np.int64(_count_escapes(planes))


@jit(nogil=True)
def _encode_side(symbols, planes, side):
    at = 0
    for group in range(len(planes)):
        escaped = _escaped(planes[group])
        while escaped:
            side[at] = symbols[u64(64 * group) + trailing_zeros(escaped)]
            escaped &= escaped - u64(1)
            at += 1


@jit(nogil=True)
def _decode(planes, side, base, symbols):
    at = u64(0)
    for group in range(len(planes)):
        masks, first = planes[group], u64(64 * group)
        address = u64(symbols.ctypes.data) + first
        if masks.size == 3:
            store_codes3(address, masks[0], masks[1], masks[2], base)
        else:
            store_codes4(address, masks[0], masks[1], masks[2], masks[3], base)
        escaped = _escaped(masks)
        while escaped:
            symbols[first + trailing_zeros(escaped)] = side[at]
            escaped &= escaped - u64(1)
            at += u64(1)
