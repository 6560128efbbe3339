"""Exponents in three tiers, T24: 2 bits for the three most frequent neighbours, 4 more for 15 others, 8 for the rest.

The form in which weights are kept at run time: fixed fields and no tables, so that a vector unit decodes it as fast as
memory delivers it, and any group of 64 can be found by counting bits.

The layout. A symbol s has the code s - base if that is 0, 1 or 2, else 3, which sends it to the second tier: a nibble
s - base2 if that is 0 ... 14, else 15, which sends it to the third: the byte itself.

    table    u8 base (0 ... 252), u8 base2 (0 ... 240), u8 0, u8 0, u32 number of nibble bytes, u32 number of raw bytes
    stream   per group of 64 symbols two masks of 64 bits: the low bits of the codes, then the high bits
    side     the nibbles, two to a byte, the first in the low half; a group's start at a byte of their own;
             zeros to a multiple of 64; the raw bytes

`base` is where three neighbours are most frequent, `base2` where 15 of the rest are. The last group is padded with `base`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tersor.kernels.coding import (
    bit_planes,
    check_coded,
    check_symbols,
    from_bit_planes,
    histogram,
    nothing,
    padded,
    require,
    require_size,
    unknown_size,
    window,
)
from tersor.kernels.dispatch import op

ANOTHER_NIBBLES = "the stream escapes another number of symbols than side holds"
ANOTHER_RAW = "the nibbles escape another number of symbols than side holds"


def windows(counts: list[int]) -> tuple[int, int]:
    """(base, base2) for symbols that occur this often. They end early enough for base + 3 and base2 + 15 to be bytes."""
    base = window(counts, 3, 252)
    rest = [*counts[:base], 0, 0, 0, *counts[base + 3 :]]
    return base, window(rest, 15, 240)


def make_table(like: Tensor, base: int, base2: int, nibble_bytes: int, raw_bytes: int) -> Tensor:
    sizes = torch.tensor([nibble_bytes, raw_bytes], dtype=torch.int32).view(torch.uint8)
    return torch.cat([torch.tensor([base, base2, 0, 0], dtype=torch.uint8), sizes]).to(like.device)


def open_table(of: str, table: Tensor, stream: Tensor, side: Tensor, n: int) -> tuple[int, int, Tensor, Tensor]:
    """base, base2, nibble bytes and raw bytes, once the sizes fit."""
    require_size(of, "table", table, 12 if n else 0)
    base, base2, zero, zero_too, *sizes = table.tolist() or [0] * 12
    nibble_bytes, raw_bytes = (int.from_bytes(bytes(sizes[i : i + 4]), "little") for i in (0, 4))
    require(of, base <= 252 and base2 <= 240 and zero == zero_too == 0, "table is none")
    require_size(of, "stream", stream, padded(n) // 4)
    require_size(of, "side", side, padded(nibble_bytes, 64) + raw_bytes)
    return base, base2, side[:nibble_bytes], side[padded(nibble_bytes, 64) :]


class Tiers(NamedTuple):
    code: Tensor  # (groups, 64)
    nibble: Tensor  # of each escaped symbol, in order
    start: Tensor  # (groups,): nibble bytes before the group


def open_tiers(of: str, stream: Tensor, nibble_bytes: Tensor, raw_bytes: Tensor) -> Tiers:
    code = from_bit_planes(stream, 2)
    escaped = code == 3
    size = (escaped.sum(1) + 1) // 2
    start = size.cumsum(0) - size
    require(of, int(size.sum()) == nibble_bytes.numel(), ANOTHER_NIBBLES)
    nibbles = torch.stack([nibble_bytes & 15, nibble_bytes >> 4], -1).flatten()
    nibble = nibbles[(2 * start[:, None] + escaped.cumsum(1) - 1)[escaped]]
    require(of, int((nibble == 15).sum()) == raw_bytes.numel(), ANOTHER_RAW)
    return Tiers(code, nibble, start)


def _check_encode(symbols: Tensor) -> None:
    check_symbols("tiered_encode", symbols)


def _check_decode(table: Tensor, stream: Tensor, side: Tensor, n: int) -> None:
    check_coded("tiered_decode", table, stream, side, n)


def _fake_encode(symbols: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    n = symbols.numel()
    return symbols.new_empty(12 if n else 0), symbols.new_empty(padded(n) // 4), unknown_size(symbols)


@op("(Tensor symbols) -> (Tensor table, Tensor stream, Tensor side)", check=_check_encode, fake=_fake_encode)
def tiered_encode(symbols: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(table, stream, side) of the bytes `symbols`, of any shape, in the layout above. No gradient (integers).

    >>> exponents = torch.tensor([127, 126, 125, 120, 120, 0], dtype=torch.uint8)
    >>> table, stream, side = tiered_encode(exponents)
    >>> table.tolist()  # 1 + 1 nibble bytes and 1 raw byte
    [125, 106, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0]
    >>> side[:2].tolist(), side[64:].tolist()  # 120 is nibble 14 from 106; 0 is nibble 15 and a raw byte
    ([238, 15], [0])
    >>> tiered_decode(table, stream, side, 6).tolist()
    [127, 126, 125, 120, 120, 0]
    """
    n = symbols.numel()
    if n == 0:
        return nothing(symbols)
    base, base2 = windows(histogram(symbols))
    symbol = torch.nn.functional.pad(symbols.flatten(), (0, padded(n) - n), value=base).view(-1, 64).short()
    code = symbol - base
    escaped = (code < 0) | (code > 2)
    nibble = symbol[escaped] - base2
    deep = (nibble < 0) | (nibble > 14)

    size = (escaped.sum(1) + 1) // 2
    nibbles = symbols.new_zeros(int(size.sum()), 2)
    at = 2 * (size.cumsum(0) - size)[:, None] + escaped.cumsum(1) - 1
    nibbles.view(-1)[at[escaped]] = nibble.masked_fill(deep, 15).to(torch.uint8)
    nibble_bytes, raw_bytes = nibbles[:, 0] | nibbles[:, 1] << 4, symbol[escaped][deep].to(torch.uint8)
    return (
        make_table(symbols, base, base2, nibble_bytes.numel(), raw_bytes.numel()),
        bit_planes(code.masked_fill(escaped, 3), 2),
        torch.cat([nibble_bytes, symbols.new_zeros(-nibble_bytes.numel() % 64), raw_bytes]),
    )


@op(
    "(Tensor table, Tensor stream, Tensor side, int n) -> Tensor",
    check=_check_decode,
    fake=lambda table, stream, side, n: table.new_empty(n),
)
def tiered_decode(table: Tensor, stream: Tensor, side: Tensor, n: int) -> Tensor:
    """The `n` symbols, uint8, of what `tiered_encode` returned. No gradient (integers).

    Raises:
        ValueError: the sizes of the tensors and the numbers of escapes in them contradict each other.
    """
    base, base2, nibble_bytes, raw_bytes = open_table("tiered_decode", table, stream, side, n)
    code, nibble, _ = open_tiers("tiered_decode", stream, nibble_bytes, raw_bytes)
    symbols, second = code + base, nibble + base2
    second[nibble == 15] = raw_bytes
    symbols[code == 3] = second
    return symbols.flatten()[:n].clone()


def tiered_offsets(table: Tensor, stream: Tensor, side: Tensor, n: int, length: int) -> Tensor:
    """Where each part of `length` symbols, a multiple of 64, starts in `side`: nibble and raw bytes before it.

    (ceil(n / length), 2), int64. With them parts are decoded independently; making them checks the data as
    `tiered_decode` does.
    """
    if length < 1 or length % 64:
        raise ValueError(f"tiered_offsets: length must be a multiple of 64, got {length}")
    _, _, nibble_bytes, raw_bytes = open_table("tiered_offsets", table, stream, side, n)
    return offsets_of("tiered_offsets", stream, nibble_bytes, raw_bytes, n, length)


def offsets_of(of: str, stream: Tensor, nibble_bytes: Tensor, raw_bytes: Tensor, n: int, length: int) -> Tensor:
    code, nibble, start = open_tiers(of, stream, nibble_bytes, raw_bytes)
    deep = torch.zeros_like(code, dtype=torch.bool)
    deep[code == 3] = nibble == 15
    count = deep.sum(1)
    return torch.stack([start, count.cumsum(0) - count], 1)[: -(-n // 64) : length // 64].contiguous()
