"""H6 on the CPU: a table of 12 bits gives both symbols of a lane at once, without branches."""

import numpy as np
import torch
from torch import Tensor

from tersor.kernels.coding import nothing, padded, require
from tersor.kernels.coding.cpu import aligned, histogram, pad
from tersor.kernels.cpu import array, jit
from tersor.kernels.prefix6 import (
    ANOTHER_SIDE,
    FIRST_LENGTH,
    LANES,
    WORDS_LEFT,
    code,
    decoding_table,
    encoding_table,
    make_table,
    open_table,
    padding,
)

_u8, _u16, _u32, _u64 = np.uint8, np.uint16, np.uint32, np.uint64


def prefix6_encode(symbols: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    n = symbols.numel()
    if n == 0:
        return nothing(symbols)
    source = array(symbols.contiguous()).reshape(-1)
    counts = histogram(source)
    escape, entries = code(counts)
    kept = [symbol for _, symbol in entries if symbol != escape]
    is_kept = np.zeros(256, np.bool_)
    is_kept[kept] = True
    side = np.empty(n - sum(counts[symbol] for symbol in kept) + 1, _u8)
    _collect(source, is_kept, side)
    source = pad(source, padding(escape, entries))
    bits, length = (np.array(column, _u32) for column in encoding_table(escape, entries))
    x, h = np.zeros(LANES, _u32), np.full(LANES, FIRST_LENGTH, _u32)
    words = np.empty(source.size, _u16)
    at = _encode(source, bits, length, x, h, words)
    stream = np.concatenate([h.astype(_u8), x.view(_u8), words[at:].view(_u8)])
    return make_table(symbols, escape, entries), torch.from_numpy(stream), torch.from_numpy(side[:-1].copy())


def prefix6_decode(table: Tensor, stream: Tensor, side: Tensor, n: int) -> Tensor:
    escape, entries = open_table(table, stream, side, n)
    symbols = torch.empty(padded(n), dtype=torch.uint8)
    if n:
        coded = aligned(stream)
        h, x = coded[:LANES].astype(_u32), coded[LANES : 5 * LANES].view(_u32).copy()
        fits = (h > 16) & (h <= 32) & (x.astype(_u64) >> h.astype(_u64) == 0)
        require("prefix6_decode", bool(fits.all()), "a lane has too few or too many bits")
        words = coded[5 * LANES :].view(_u16)
        # a round reads up to 64 words; those past the end count as an error only if they are needed
        last = np.concatenate([words[-LANES:], np.zeros(LANES + 1, _u16)])
        end = _decode(_pairs(entries), x, h, words, last, array(symbols))
        ended = end == words.size and not x.any() and bool((h == FIRST_LENGTH).all())
        require("prefix6_decode", ended, WORDS_LEFT)
        escapes = _fill(array(symbols), _u8(escape), array(side.contiguous()))
        require("prefix6_decode", escapes == side.numel(), ANOTHER_SIDE)
    return symbols[:n]


def _pairs(entries: list[tuple[int, int]]) -> np.ndarray:
    """Per 12 bits: first symbol | second symbol << 8 | their length << 16."""
    symbol, length = (np.array(column, _u32) for column in decoding_table(entries))
    bits = np.arange(4096, dtype=_u32)
    first, second = bits & 63, bits >> length[bits & 63] & 63
    return symbol[first] | symbol[second] << 8 | (length[first] + length[second]) << 16


@jit(nogil=True)
def _collect(symbols, is_kept, side):
    """The symbols that are not kept; `side` has room for one more."""
    at = _u64(0)
    for symbol in symbols:
        side[at] = symbol
        at += _u64(not is_kept[symbol])


@jit(nogil=True)
def _encode(symbols, bits, length, xs, hs, words):
    """Fills `words` from the end; returns where they begin."""
    at = _u64(words.size)
    for start in range(symbols.size - 2 * LANES, -1, -2 * LANES):
        firsts, seconds = symbols[start : start + LANES], symbols[start + LANES : start + 2 * LANES]
        for back in range(LANES):
            lane = LANES - 1 - back
            position = 4 * (lane % 16) + lane // 16
            first, second = firsts[position], seconds[position]
            x, h, more = _u64(xs[lane]), hs[lane], length[first] + length[second]
            if h + more > _u32(32):
                at -= _u64(1)
                h -= _u32(16)
                words[at] = _u16(x >> _u64(h))
                x &= (_u64(1) << _u64(h)) - _u64(1)
            x = x << _u64(length[second]) | _u64(bits[second])
            xs[lane] = _u32(x << _u64(length[first]) | _u64(bits[first]))
            hs[lane] = h + more
    return np.int64(at)


@jit(nogil=True)
def _decode(pairs, xs, hs, words, last, symbols):
    """The number of words read; stops early when they run out."""
    at = _u64(0)
    for start in range(0, symbols.size, 2 * LANES):
        firsts, seconds = symbols[start : start + LANES], symbols[start + LANES : start + 2 * LANES]
        if at + _u64(LANES) <= _u64(words.size):
            at = _round(pairs, xs, hs, words, at, firsts, seconds)
        else:
            if at > _u64(words.size):
                break
            # `last` begins with the stream's last words, at most 64 of them, followed by zeros
            skipped = _u64(words.size + LANES + 1 - last.size)
            at = skipped + _round(pairs, xs, hs, last, at - skipped, firsts, seconds)
    return np.int64(at)


@jit(nogil=True)
def _round(pairs, xs, hs, words, at, firsts, seconds):
    for v in range(_u64(4)):
        for i in range(_u64(16)):
            lane, position = _u64(16) * v + i, _u64(4) * i + v
            x = xs[lane]
            pair = pairs[x & _u32(4095)]
            firsts[position] = _u8(pair)
            seconds[position] = _u8(pair >> _u32(8))
            x, h = x >> (pair >> _u32(16)), hs[lane] - (pair >> _u32(16))
            # arithmetic instead of a branch that nobody can predict
            empty = _u32(h <= _u32(16))
            xs[lane] = x | _u32(words[at]) * empty << (h & _u32(31))
            hs[lane] = h + _u32(16) * empty
            at += _u64(empty)
    return at


@jit(nogil=True)
def _fill(symbols, escape, side):
    """Puts the bytes of `side` where the escape is; returns how many it needed."""
    at = 0
    for start in range(0, symbols.size, 128):
        block = symbols[start : start + 128]
        escapes = np.int32(0)
        for symbol in block:
            escapes += np.int32(symbol == escape)
        if escapes:
            for i in range(block.size):
                if block[i] == escape:
                    if at < side.size:
                        block[i] = side[at]
                    at += 1
    return at
