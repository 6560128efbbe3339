"""R11 on the CPU: lane after lane, without branches; the lanes do not wait for each other."""

import numpy as np
import torch
from torch import Tensor

from tersor.kernels.coding import nothing, padded, require
from tersor.kernels.coding.cpu import aligned, histogram, pad
from tersor.kernels.cpu import array, jit
from tersor.kernels.rans11 import LANES, LOWEST, WORDS_LEFT, frequencies, make_table, open_table

_u8, _u16, _u32, _u64 = np.uint8, np.uint16, np.uint32, np.uint64


def rans11_encode(symbols: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    n = symbols.numel()
    if n == 0:
        return nothing(symbols)
    source = array(symbols.contiguous()).reshape(-1)
    f = frequencies(histogram(source))
    source = pad(source, f.index(max(f)))
    start = np.cumsum([0, *f[:-1]])
    words = np.empty(source.size, _u16)
    states = np.full(LANES, LOWEST, _u32)
    at = _encode(source, np.array(f, _u32), start.astype(_u32), states, words)
    stream = np.concatenate([states.view(_u8), words[at:].view(_u8)])
    return make_table(symbols, f), torch.from_numpy(stream), symbols.new_empty(0)


def rans11_decode(table: Tensor, stream: Tensor, side: Tensor, n: int) -> Tensor:
    f = open_table(table, stream, side, n)
    symbols = torch.empty(padded(n), dtype=torch.uint8)
    if n:
        coded = aligned(stream)
        states = coded[: 4 * LANES].view(_u32).copy()
        require("rans11_decode", bool((states >= LOWEST).all()), "a state is below 2^16")
        # a round reads up to 64 words; those past the end count as an error only if they are needed
        words = coded[4 * LANES :].view(_u16)
        last = np.concatenate([words[-LANES:], np.zeros(LANES + 1, _u16)])
        end = _decode(_slots(f), states, words, last, array(symbols))
        require("rans11_decode", end == words.size and bool((states == LOWEST).all()), WORDS_LEFT)
    return symbols[:n]


def _slots(f: list[int]) -> np.ndarray:
    """Per slot: symbol << 24 | (f - 1) << 12 | slot - start."""
    frequency = np.array(f, _u32)
    symbol = np.repeat(np.arange(256, dtype=_u32), frequency)
    start = np.cumsum(frequency, dtype=_u32) - frequency
    return symbol << _u32(24) | (frequency[symbol] - _u32(1)) << _u32(12) | np.arange(2048, dtype=_u32) - start[symbol]


@jit(nogil=True)
def _encode(symbols, frequency, start, states, words):
    """Fills `words` from the end; returns where they begin."""
    at = _u64(words.size)
    i = _u64(symbols.size)
    for _ in range(symbols.size // LANES):
        for lane in range(_u64(LANES)):
            i -= _u64(1)
            symbol = symbols[i]
            f, x = frequency[symbol], states[_u64(LANES - 1) - lane]
            if _u64(x) >= _u64(f) << _u64(21):
                at -= _u64(1)
                words[at] = _u16(x)
                x = x >> _u32(16)
            quotient = _u32(x // f)
            states[_u64(LANES - 1) - lane] = (quotient << _u32(11)) + (x - quotient * f) + start[symbol]
    return np.int64(at)


@jit(nogil=True)
def _decode(slots, states, words, last, symbols):
    """The number of words read; stops early when they run out."""
    at = i = _u64(0)
    for _ in range(symbols.size // LANES):
        if at + _u64(LANES) <= _u64(words.size):
            at = _round(slots, states, words, at, symbols, i)
        else:
            if at > _u64(words.size):
                break
            # `last` begins with the stream's last words, at most 64 of them, followed by zeros
            skipped = _u64(words.size + LANES + 1 - last.size)
            at = skipped + _round(slots, states, last, at - skipped, symbols, i)
        i += _u64(LANES)
    return np.int64(at)


@jit(nogil=True)
def _round(slots, states, words, at, symbols, i):
    for lane in range(_u64(LANES)):
        x = states[lane]
        slot = slots[x & _u32(2047)]
        symbols[i + lane] = _u8(slot >> _u32(24))
        x = ((slot >> _u32(12) & _u32(4095)) + _u32(1)) * (x >> _u32(11)) + (slot & _u32(4095))
        # arithmetic instead of a branch that nobody can predict
        empty = _u32(x < _u32(LOWEST))
        states[lane] = x << empty * _u32(16) | _u32(words[at]) * empty
        at += _u64(empty)
    return at
