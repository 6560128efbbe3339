"""Range asymmetric numeral systems with probabilities of 11 bits, R11: within 1 % of the entropy for any bytes.

Source: arXiv:1311.2540 (rANS). 64 states are interleaved, so that 64 symbols are decoded side by side.

The layout. Symbol s has the frequency f[s] and the start c[s] = f[0] + ... + f[s - 1]; the frequencies add up to 2048 and
every symbol that occurs has one. Lane l decodes the symbols l, 64 + l, 128 + l, ... from its state x:

    slot = x mod 2048,  s = the symbol with c[s] <= slot < c[s] + f[s],  x = f[s] floor(x / 2048) + slot - c[s]
    if x < 2^16:  x = 2^16 x + the stream's next word

where lanes take words in their order. States stay in 2^16 ... 2^32 - 1. The encoder walks backwards from x = 2^16.

    table    32 bytes: bit s mod 8 of byte s / 8 tells whether s occurs; u16 f[s] for each that does
    stream   64 x u32 states, u16 words
    side     empty

The end is padded with the most frequent symbol.
"""

import heapq
import math

import torch
from torch import Tensor

from tersor.kernels.coding import (
    check_coded,
    check_symbols,
    histogram,
    nothing,
    padded,
    require,
    require_size,
    unknown_size,
)
from tersor.kernels.dispatch import op

TOTAL = 2048
LANES = 64
LOWEST = 2**16

WORDS_LEFT = "the words of the stream do not lead back to the encoder's first states"


def frequencies(counts: list[int]) -> list[int]:
    """Frequencies, at least 1 for each symbol that occurs, that add up to 2048 with (almost) the shortest code."""
    n = sum(counts)
    f = [max(count * TOTAL // n, 1) if count else 0 for count in counts]
    missing = TOTAL - sum(f)
    # one more (or less) is given where it saves most (or costs least) bits: count * log2((f + step) / f)
    step = 1 if missing > 0 else -1

    def cost(s: int) -> tuple[float, int]:
        return counts[s] * math.log2(f[s] / (f[s] + step)), s

    heap = [cost(s) for s, frequency in enumerate(f) if frequency + min(step, 0) > 0]
    heapq.heapify(heap)
    for _ in range(abs(missing)):
        _, s = heapq.heappop(heap)
        f[s] += step
        if f[s] + min(step, 0) > 0:
            heapq.heappush(heap, cost(s))
    return f


def make_table(like: Tensor, f: list[int]) -> Tensor:
    present = [sum((f[8 * i + b] > 0) << b for b in range(8)) for i in range(32)]
    numbers = [byte for frequency in f if frequency for byte in (frequency & 255, frequency >> 8)]
    return torch.tensor(present + numbers, dtype=torch.uint8, device=like.device)


def open_table(table: Tensor, stream: Tensor, side: Tensor, n: int) -> list[int]:
    """The frequencies, once they and the sizes fit."""
    of = "rans11_decode"
    require_size(of, "side", side, 0)
    if n == 0:
        require_size(of, "table", table, 0)
        require_size(of, "stream", stream, 0)
        return []
    numbers = table.tolist()
    present = [s for s in range(256) if s // 8 < len(numbers) and numbers[s // 8] >> s % 8 & 1]
    require_size(of, "table", table, 32 + 2 * len(present))
    f = [0] * 256
    for i, s in enumerate(present):
        f[s] = numbers[32 + 2 * i] | numbers[33 + 2 * i] << 8
    require(of, all(f[s] for s in present) and sum(f) == TOTAL, f"the frequencies add up to {sum(f)} instead of 2048")
    words = stream.numel() - 4 * LANES
    require(of, words >= 0 and words % 2 == 0, f"stream has {stream.numel()} bytes, not 256 + 2 per word")
    require(of, words // 2 <= padded(n), "stream has more words than symbols")
    return f


def _check_encode(symbols: Tensor) -> None:
    check_symbols("rans11_encode", symbols)


def _check_decode(table: Tensor, stream: Tensor, side: Tensor, n: int) -> None:
    check_coded("rans11_decode", table, stream, side, n)


def _fake_encode(symbols: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return unknown_size(symbols), unknown_size(symbols), symbols.new_empty(0)


@op("(Tensor symbols) -> (Tensor table, Tensor stream, Tensor side)", check=_check_encode, fake=_fake_encode)
def rans11_encode(symbols: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(table, stream, side) of the bytes `symbols`, of any shape, in the layout above. No gradient (integers).

    >>> table, stream, side = rans11_encode(torch.tensor([7, 7, 7, 7], dtype=torch.uint8))
    >>> table.tolist()[:2], table.tolist()[32:], stream.numel(), side.numel()  # one symbol: states only
    ([128, 0], [0, 8], 256, 0)
    >>> rans11_decode(table, stream, side, 4)
    tensor([7, 7, 7, 7], dtype=torch.uint8)
    """
    n = symbols.numel()
    if n == 0:
        return nothing(symbols)
    f = frequencies(histogram(symbols))
    likeliest = f.index(max(f))
    rows = torch.nn.functional.pad(symbols.flatten(), (0, padded(n) - n), value=likeliest).view(-1, LANES).long()
    frequency = torch.tensor(f, device=symbols.device)
    start = frequency.cumsum(0) - frequency
    x = torch.full((LANES,), LOWEST, device=symbols.device)
    words = []
    for row in rows.flip(0):
        full = x >= frequency[row] << 21  # then the state would outgrow 32 bits
        words.append(x[full].flip(0))
        x = torch.where(full, x >> 16, x)
        x = (x // frequency[row] << 11) + x % frequency[row] + start[row]
    word = torch.cat(words).flip(0).to(torch.int16)
    stream = torch.cat([x.to(torch.int32).view(torch.uint8), word.view(torch.uint8)])
    return make_table(symbols, f), stream, symbols.new_empty(0)


@op(
    "(Tensor table, Tensor stream, Tensor side, int n) -> Tensor",
    check=_check_decode,
    fake=lambda table, stream, side, n: table.new_empty(n),
)
def rans11_decode(table: Tensor, stream: Tensor, side: Tensor, n: int) -> Tensor:
    """The `n` symbols, uint8, of what `rans11_encode` returned. No gradient (integers).

    Raises:
        ValueError: the frequencies do not add up to 2048, or the words do not lead back to the first states.
    """
    f = open_table(table, stream, side, n)
    if n == 0:
        return table.new_empty(0)
    frequency = torch.tensor(f, device=table.device)
    start = frequency.cumsum(0) - frequency
    symbol_of = torch.arange(256, device=table.device).repeat_interleave(frequency)
    stream = stream.clone()  # at an address where it may be viewed as words
    x = stream[: 4 * LANES].view(torch.int32).long() & 2**32 - 1
    words = stream[4 * LANES :].view(torch.int16).long() & 2**16 - 1
    require("rans11_decode", bool((x >= LOWEST).all()), "a state is below 2^16")
    at = 0
    rows = []
    for _ in range(padded(n) // LANES):
        slot = x & TOTAL - 1
        row = symbol_of[slot]
        x = frequency[row] * (x >> 11) + slot - start[row]
        empty = x < LOWEST
        count = int(empty.sum())
        require("rans11_decode", at + count <= len(words), WORDS_LEFT)
        x[empty] = x[empty] << 16 | words[at : at + count]
        at += count
        rows.append(row)
    require("rans11_decode", at == len(words) and bool((x == LOWEST).all()), WORDS_LEFT)
    return torch.cat(rows)[:n].to(torch.uint8)
