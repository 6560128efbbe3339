"""T24 on the CPU: symbols 64 at a time; escaped ones 8 at a time, in the bytes of a word, where AVX-512 does not expand."""

# pyright: reportCallIssue=false
# (an intrinsic is called without its first argument)

import numpy as np
import torch
from torch import Tensor

from tersor.kernels import simd512
from tersor.kernels.coding import nothing, padded, require
from tersor.kernels.coding.cpu import (
    SPREAD,
    aligned,
    bit_plane,
    end_copy,
    histogram,
    load,
    merge_tiers,
    pad,
    popcount,
    spread_nibbles,
    trailing_zeros,
    u64,
)
from tersor.kernels.cpu import array, jit
from tersor.kernels.tiered import ANOTHER_NIBBLES, ANOTHER_RAW, make_table, open_table, windows

_u8 = np.uint8

# symbols that are decoded while they stay in the first-level cache, in words of 8
_CHUNK = u64(512)


def tiered_encode(symbols: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    n = symbols.numel()
    if n == 0:
        return nothing(symbols)
    source = array(symbols.contiguous()).reshape(-1)
    base, base2 = windows(histogram(source))
    stream = torch.empty(padded(n) // 4, dtype=torch.uint8)
    nibbles, raw = np.zeros(padded(n) // 2, _u8), np.empty(padded(n) + 1, _u8)
    sizes = _encode(pad(source, base), _u8(base), _u8(base2), array(stream).view(np.uint64), nibbles, raw)
    side = torch.zeros(padded(sizes[0], 64) + sizes[1], dtype=torch.uint8)
    array(side)[: sizes[0]] = nibbles[: sizes[0]]
    array(side)[padded(sizes[0], 64) :] = raw[: sizes[1]]
    return make_table(symbols, base, base2, *sizes), stream, side


def tiered_decode(table: Tensor, stream: Tensor, side: Tensor, n: int) -> Tensor:
    base, base2, nibble_bytes, raw_bytes = open_table("tiered_decode", table, stream, side, n)
    symbols = torch.empty(padded(n), dtype=torch.uint8)
    planes = aligned(stream).view(np.uint64)
    require("tiered_decode", nibble_bytes_of(planes) == nibble_bytes.numel(), ANOTHER_NIBBLES)
    words = array(symbols).view(np.uint64)
    nibbles = array(nibble_bytes.contiguous()), end_copy(nibble_bytes)
    raw = array(raw_bytes.contiguous())
    end = decode_groups(planes, nibbles, raw, _u8(base), _u8(base2), words, 0, 0, expands())
    require("tiered_decode", end == raw_bytes.numel(), ANOTHER_RAW)
    return symbols[:n]


def expands() -> bool | None:
    """Whether nibbles go to their places 64 at a time, for `decode_groups`: True, or None, for another function of Numba's."""
    return True if simd512.available("vbmi2") else None


@jit(nogil=True)
def _encode(symbols, base, base2, planes, nibbles, raw):
    nibble_bytes = raw_bytes = u64(0)
    for group in range(u64(0), u64(planes.size), u64(2)):
        first = group * u64(32)
        address = u64(symbols.ctypes.data) + first
        low, high = bit_plane(address, base, _u8(3), _u8(1)), bit_plane(address, base, _u8(3), _u8(2))
        planes[group], planes[group + u64(1)] = low, high
        escaped, count = low & high, u64(0)
        while escaped:
            symbol = symbols[first + trailing_zeros(escaped)]
            escaped &= escaped - u64(1)
            nibble = min(u64(_u8(symbol - base2)), u64(15))
            # a byte is written as if no other nibble came, and again if one does
            at = nibble_bytes + (count >> u64(1))
            odd = count & u64(1)
            nibbles[at] = _u8(nibbles[at] * odd | nibble << odd * u64(4))
            # likewise a raw byte is overwritten if it was none
            raw[raw_bytes] = symbol
            raw_bytes += nibble + u64(1) >> u64(4)
            count += u64(1)
        nibble_bytes += count + u64(1) >> u64(1)
    return np.int64(nibble_bytes), np.int64(raw_bytes)


@jit(nogil=True)
def nibble_bytes_of(planes):
    """How many the escapes need."""
    total = u64(0)
    for i in range(0, planes.size, 2):
        total += (popcount(planes[i] & planes[i + 1]) + u64(1)) >> u64(1)
    return np.int64(total)


@jit(nogil=True)
def decode_groups(planes, nibbles, raw, base, base2, symbols, nibble_start, raw_start, expand):
    """The symbols (words of 8) of the groups in `planes`, whose escapes start at these bytes of `nibbles` and `raw`.

    Returns where the next group's raw bytes start, or -1 if there are fewer than needed. `nibbles` must suffice.
    """
    nibble_start, raw_start = u64(nibble_start), u64(raw_start)
    for start in range(u64(0), u64(symbols.size), _CHUNK):
        stop = min(start + _CHUNK, u64(symbols.size))
        nibble_start = _spread_nibbles(planes, nibbles, symbols, start, stop, nibble_start, expand)
        for group in range(start, stop, u64(8)):
            low, high = planes[group >> u64(2)], planes[(group >> u64(2)) + u64(1)]
            deep = merge_tiers(u64(symbols.ctypes.data) + group * u64(8), low, high, base, base2)
            while deep:
                if raw_start >= u64(raw.size):
                    return -1
                lane = trailing_zeros(deep)
                word, shift = group + (lane >> u64(3)), (lane & u64(7)) * u64(8)
                symbols[word] = symbols[word] & ~(u64(255) << shift) | u64(raw[raw_start]) << shift
                raw_start += u64(1)
                deep &= deep - u64(1)
    return np.int64(raw_start)


@jit(nogil=True)
def _spread_nibbles(planes, nibbles, symbols, start, stop, nibble_start, expand):
    """Nibbles in the places of the symbols that they stand for, zeros elsewhere."""
    stream, end = nibbles
    for group in range(start, stop, u64(8)):
        escaped = planes[group >> u64(2)] & planes[(group >> u64(2)) + u64(1)]
        address = u64(stream.ctypes.data) + nibble_start
        if nibble_start + u64(40) > u64(stream.size):  # the group's loads reach this far
            address = u64(end.ctypes.data) + u64(64) - (u64(stream.size) - nibble_start)
        at = u64(0)  # in nibbles
        if expand is not None:
            simd512.expand_nibbles(address, escaped, u64(symbols.ctypes.data) + group * u64(8))
            at = popcount(escaped)
        else:
            for word in range(group, group + u64(8)):
                lanes = SPREAD[escaped & u64(255)]
                four_or_none = (at & u64(1)) * u64(4)
                symbols[word] = spread_nibbles(load(address + (at >> u64(1))) >> four_or_none, lanes)
                at += popcount(lanes)
                escaped >>= u64(8)
        nibble_start += (at + u64(1)) >> u64(1)
    return nibble_start
